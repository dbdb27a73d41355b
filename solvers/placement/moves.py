"""From one placement to another: which experts move where, how many bytes that is, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.placement import Placement

Held = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One expert's weights, sent from a device that holds them to one that does not."""

    layer: int
    expert: int
    source: int
    target: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MovePlan:
    """moves in the order of rounds; rounds: how many moves each round has. In a round every device sends at most one
    expert and receives at most one, so a round lasts as long as one expert's transfer; no plan has fewer rounds.

    peak_extra_bytes: the most that a device holds beyond its slots at any moment, if it drops an expert that leaves
    it as soon as its last copy was sent, and one that it need not send at once.
    """

    moves: tuple[Move, ...]
    rounds: tuple[int, ...]
    moved_bytes: int
    peak_extra_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_moves(old: Placement, new: Placement, expert_bytes: int) -> MovePlan:
    """The moves that turn `old` into `new`; device d of one is device d of the other, more or fewer of them.

    A device receives what it does not hold yet, from the holder that has to send least so far, a holder in its own
    node first. The rounds are an edge colouring of the bipartite graph of senders and receivers, which needs as
    many colours as the busiest of them has moves (Koenig, 1916).
    Errors: InputError where the placements are of different models.
    """
    before, after = holdings(old), holdings(new)
    require_same_model(old, new)
    devices = max(old.devices, new.devices)
    before, after = widened(before, devices), widened(after, devices)
    edges = _edges(before, after, new.devices_per_node)
    colours = _edge_colours([(source, target) for _, _, source, target in edges], devices)
    order = sorted(range(len(edges)), key=lambda i: (colours[i], *edges[i]))
    moves = tuple(
        Move(layer=layer, expert=expert, source=source, target=target, bytes=expert_bytes)
        for layer, expert, source, target in (edges[i] for i in order)
    )
    rounds = tuple(np.bincount([colours[i] for i in order]).tolist()) if moves else ()
    slots = np.zeros(devices, np.int64)
    slots[: old.devices] = old.layers * old.slots_per_device
    slots[: new.devices] = np.maximum(slots[: new.devices], new.layers * new.slots_per_device)
    return MovePlan(
        moves=moves,
        rounds=rounds,
        moved_bytes=expert_bytes * len(moves),
        peak_extra_bytes=expert_bytes * _peak_extra(before, after, moves, rounds, slots),
    )


def require_same_model(old: Placement, new: Placement) -> None:
    for field in ("layers", "num_experts"):
        if getattr(old, field) != getattr(new, field):
            raise InputError(
                f"{field} is {getattr(old, field)} in the placement in force, {getattr(new, field)} in the new one",
                where="placement",
                hint="move between placements of one model",
            )


def holdings(placement: Placement) -> Held:
    """[layers, experts, devices]: who holds what."""
    held = np.zeros((placement.layers, placement.num_experts, placement.devices), np.bool_)
    device = np.arange(placement.slots) // placement.slots_per_device
    held[np.arange(placement.layers)[:, None], placement.physical_to_logical, device[None, :]] = True
    return held


def widened(held: Held, devices: int) -> Held:
    """The same with devices that hold nothing at the end, or without the devices at the end."""
    missing = max(0, devices - held.shape[2])
    return np.pad(held, ((0, 0), (0, 0), (0, missing)))[:, :, :devices]


def _edges(before: Held, after: Held, devices_per_node: int) -> list[tuple[int, int, int, int]]:
    """(layer, expert, source, target) of every move."""
    sent = np.zeros(before.shape[2], np.int64)
    edges = []
    # Experts of few holders choose first: they have the least freedom.
    wanted = np.argwhere(after & ~before)
    holders = before.sum(axis=2)[wanted[:, 0], wanted[:, 1]] if len(wanted) else np.empty(0, np.int64)
    for layer, expert, target in wanted[np.argsort(holders, kind="stable")].tolist():
        sources = np.flatnonzero(before[layer, expert])
        far = sources // devices_per_node != target // devices_per_node
        source = int(sources[np.lexsort((sources, far, sent[sources]))[0]])
        sent[source] += 1
        edges.append((layer, expert, source, target))
    return edges


def _edge_colours(edges: Sequence[tuple[int, int]], devices: int) -> list[int]:
    """A colour for every (source, target) so that no device has two edges of a colour on one side."""
    degree = max(
        (max(np.bincount(side).tolist()) for side in zip(*edges, strict=True)) if edges else (0,), default=0
    )
    # at[side][device][colour] -> edge
    at = np.full((2, devices, degree), -1)
    colours = [-1] * len(edges)
    for edge, ends in enumerate(edges):
        free = [int(np.flatnonzero(at[side, end] < 0)[0]) for side, end in enumerate(ends)]
        if at[1, ends[1], free[0]] >= 0:
            _flip(at, colours, edges, ends[1], (free[0], free[1]))
        colours[edge] = free[0]
        at[0, ends[0], free[0]] = at[1, ends[1], free[0]] = edge
    return colours


def _flip(
    at: NDArray[np.int64],
    colours: list[int],
    edges: Sequence[tuple[int, int]],
    start: int,
    pair: tuple[int, int],
) -> None:
    """Exchange two colours along the path that leaves target `start` with the first of them."""
    path, side, device, colour = [], 1, start, pair[0]
    while (edge := int(at[side, device, colour])) >= 0:
        path.append(edge)
        side, colour = 1 - side, pair[0] + pair[1] - colour
        device = edges[edge][side]
    for edge in path:
        for end in (0, 1):
            at[end, edges[edge][end], colours[edge]] = -1
    for edge in path:
        colours[edge] = pair[0] + pair[1] - colours[edge]
        for end in (0, 1):
            at[end, edges[edge][end], colours[edge]] = edge


def _peak_extra(
    before: Held, after: Held, moves: Sequence[Move], rounds: Sequence[int], slots: NDArray[np.int64]
) -> int:
    """Experts beyond the slots of a device, at worst."""
    to_send: dict[tuple[int, int, int], int] = {}
    for move in moves:
        key = (move.layer, move.expert, move.source)
        to_send[key] = to_send.get(key, 0) + 1
    resident = (before & after).sum(axis=(0, 1))
    leaving = _leaving_senders(before, after, to_send)
    np.add.at(resident, [device for _, _, device in leaving], 1)
    peak, next_move = int((resident - slots).max()), 0
    for count in rounds:
        batch = moves[next_move : next_move + count]
        next_move += count
        np.add.at(resident, [move.target for move in batch], 1)
        peak = max(peak, int((resident - slots).max()))
        for move in batch:
            key = (move.layer, move.expert, move.source)
            to_send[key] -= 1
            if to_send[key] == 0 and key in leaving:
                resident[move.source] -= 1
    return max(0, peak)


def _leaving_senders(
    before: Held, after: Held, to_send: Mapping[tuple[int, int, int], int]
) -> set[tuple[int, int, int]]:
    """What a device does not keep but has to send first."""
    return {key for key in to_send if before[key] and not after[key]}
