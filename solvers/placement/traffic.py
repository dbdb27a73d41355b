"""Token traffic of one layer: what every token costs, and what it would cost with one of its experts moved.

A *unit* is one replica of an expert. A *row* is a token, or several tokens that cost the same, with a weight;
its *items* are the units that count for it. Unit U (one past the last) and device D pad rows of fewer items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.problem import PlacementProblem

Moves = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Rows under one assignment. items: [rows, width] units; cost: [rows];
    moves: float32 [rows, width, D + 1], the change of a row's cost if that item alone went to that device.
    """

    items: Ints
    cost: Floats
    moves: Moves


class TrafficRows(Protocol):
    """Rows of one layer. weight: [rows]; ids: [rows, top_k] experts; units: the expert of every unit."""

    weight: Floats
    ids: Ints
    experts: Ints
    devices: int

    def look(self, rows: Ints, device_of: Ints) -> Look:
        """device_of: [units + 1], the last entry D."""
        ...


class HomeRows:
    """Fan-out: the number of distinct devices that a row's items are on.

    With replicas the items are those that a greedy cover picks under the given assignment, so `moves`, which keeps
    that choice, is an upper estimate of the change; without replicas it is exact.
    """

    def __init__(self, ids: Ints, weight: Floats, experts: Ints, devices: int) -> None:
        self.ids, self.weight, self.experts, self.devices = ids, weight, experts, devices
        self.single = len(np.unique(experts)) == len(experts)

    def look(self, rows: Ints, device_of: Ints) -> Look:
        items = self.chosen(rows, device_of)
        at = device_of[items]
        counts = device_counts(at, self.devices)
        absent = counts == 0
        alone = np.take_along_axis(counts, at, 1) == 1
        cost = self.devices - absent[:, : self.devices].sum(axis=1, dtype=np.float64)
        moves = absent[:, None, :].astype(np.float32) - alone[:, :, None]
        return Look(items=items, cost=cost, moves=moves)

    def reached(self, device_of: Ints) -> Ints:
        """[rows, widest]: the devices that each row reaches, padded with D; device_of: [units]."""
        items = self.chosen(np.arange(len(self.ids)), np.append(device_of, self.devices))
        return distinct(np.append(device_of, self.devices)[items], self.devices)

    def cost(self, device_of: Ints) -> float:
        """The weighted sum of the rows' costs."""
        return float(self.weight @ (self.reached(device_of) < self.devices).sum(axis=1))

    def chosen(self, rows: Ints, device_of: Ints) -> Ints:
        """[rows, top_k] units that serve."""
        return self.ids[rows] if self.single else self._cover(self.ids[rows], device_of)

    def _cover(self, ids: Ints, device_of: Ints) -> Ints:
        """[rows, top_k] units: repeatedly take the device with most experts of the row still open."""
        num_experts, units = int(self.experts.max()) + 1, len(self.experts)
        if units == self.devices:
            # No device has two of a row's experts: every device has one unit.
            return self._lowest(ids, device_of)
        unit_at = np.full((num_experts, self.devices), -1)
        unit_at[self.experts, device_of[:-1]] = np.arange(units)
        options = unit_at[ids]
        items = np.full(ids.shape, -1)
        for _ in range(min(ids.shape[1], self.devices)):
            gain = ((options >= 0) & (items < 0)[:, :, None]).sum(axis=1)
            best = gain.argmax(axis=1)
            offered = np.take_along_axis(options, best[:, None, None], 2)[:, :, 0]
            items = np.where(items < 0, offered, items)
        return items

    def _lowest(self, ids: Ints, device_of: Ints) -> Ints:
        """[rows, top_k]: of every expert's units the one on the lowest device."""
        order = np.lexsort((device_of[:-1], self.experts))
        first = np.full(int(self.experts.max()) + 1, len(self.experts))
        first[self.experts[order[::-1]]] = order[::-1]
        return first[ids]


class FirstRows(HomeRows):
    """As HomeRows, but of an expert's replicas the one on the lowest device counts: what the greedy cover comes to
    where every unit has a device of its own; `devices` are then their nodes."""

    def _cover(self, ids: Ints, device_of: Ints) -> Ints:
        return self._lowest(ids, device_of)


class MigrateRows:
    """Landing changes towards the previous and the next layer, whose landings are given.

    A token lands on the device with most of its experts, ties to the lowest. neighbours: [tokens, 0 to 2] landings.
    """

    def __init__(self, ids: Ints, weight: Floats, experts: Ints, devices: int, neighbours: Ints) -> None:
        self.ids, self.weight, self.experts, self.devices = ids, weight, experts, devices
        self.neighbours = neighbours
        first = np.searchsorted(experts, np.arange(int(experts.max()) + 1))
        counts = np.bincount(experts)
        steps = np.arange(counts.max())
        table = np.where(steps < counts[:, None], first[:, None] + steps, len(experts))
        self.items = table[ids].reshape(len(ids), -1)

    def landing(self, device_of: Ints) -> Ints:
        """[tokens]: where every token lands."""
        counts = device_counts(device_of[self.items], self.devices)
        return np.asarray(counts[:, : self.devices].argmax(axis=1))

    def look(self, rows: Ints, device_of: Ints) -> Look:
        items, d = self.items[rows], self.devices
        at = device_of[items]
        device = np.arange(d + 1)
        # One integer orders devices by count, then lowest first; the padding device sorts below all.
        key = device_counts(at, d) * d + (d - 1 - device)
        key[:, d] = -(2**30)
        order = np.argsort(-key, axis=1)[:, :2]
        top, second = order[:, :1], order[:, 1:]
        top_key, second_key = np.take_along_axis(key, top, 1), np.take_along_axis(key, second, 1)
        lowered = np.take_along_axis(key, at, 1) - d
        steady = (at != top) | (lowered > second_key)
        kept = np.where(steady, top, second)
        kept_key = np.where(at == top, np.maximum(lowered, second_key), top_key)
        price = (device[None, :, None] != self.neighbours[rows][:, None, :]).sum(axis=2, dtype=np.float32)
        cost = np.take_along_axis(price, top, 1)
        moved = np.where(
            (key + d)[:, None, :] > kept_key[:, :, None],
            price[:, None, :],
            np.take_along_axis(price, kept, 1)[:, :, None],
        )
        return Look(items=items, cost=cost[:, 0].astype(np.float64), moves=moved - cost[:, :, None])


class SwapTable:
    """The cost change of every swap of two units of a layer, kept up to date while swaps are applied.

    A row's cost depends on how many of its items each device holds. So a swap of u on a with v on b changes rows with
    u only as if u moved to b, rows with v only as if v moved to a, and rows with both not at all:
    change = to[u, b] + to[v, a] - both[u, v] - both[v, u], with to[u, d] the summed moves of u's rows and
    both[u, v] the part of to[u, device of v] that comes from rows with v.
    """

    def __init__(self, rows: TrafficRows, device_of: Ints) -> None:
        self.rows, self.units, self.devices = rows, len(device_of), rows.devices
        self.device_of = np.append(device_of, rows.devices)
        self.holders = _rows_of_experts(rows.ids, int(rows.experts.max()) + 1)
        look = rows.look(np.arange(len(rows.ids)), self.device_of)
        self.items, self.row_cost, self.moves = look.items.copy(), look.cost, look.moves
        self.to = np.zeros((self.units + 1, self.devices + 1))
        self.both = np.zeros((self.units + 1, self.units + 1))
        self.pairs = self._pairs(look.items, look.moves)
        self._scatter(look.items, look.moves, self.pairs, rows.weight)

    @property
    def cost(self) -> float:
        return float(self.rows.weight @ self.row_cost)

    def changes(self) -> Floats:
        """[units, units]; entries of pairs on one device mean nothing."""
        half = self.to[:-1, self.device_of[:-1]] - self.both[:-1, :-1]
        return np.asarray(half + half.T)

    def swap(self, u: int, v: int) -> None:
        experts, device_of = self.rows.experts, self.device_of
        device_of[u], device_of[v] = device_of[v], device_of[u]
        at_u, at_v = self.holders[experts[u]], self.holders[experts[v]]
        rows = np.concatenate([at_u, at_v[~(self.rows.ids[at_v] == experts[u]).any(axis=1)]])
        look = self.rows.look(rows, device_of)
        weight, pairs = self.rows.weight[rows], self._pairs(look.items, look.moves)
        if np.array_equal(look.items, self.items[rows]):
            self._scatter(look.items, look.moves - self.moves[rows], pairs - self.pairs[rows], weight)
        else:
            self._scatter(self.items[rows], self.moves[rows], self.pairs[rows], -weight)
            self._scatter(look.items, look.moves, pairs, weight)
        self.items[rows], self.row_cost[rows], self.moves[rows] = look.items, look.cost, look.moves
        self.pairs[rows] = pairs

    def _pairs(self, items: Ints, moves: Moves) -> Moves:
        """[rows, width, width]: the change if item i went to the device of item j."""
        return np.take_along_axis(moves, self.device_of[items][:, None, :], 2)

    def _scatter(self, items: Ints, moves: Moves, pairs: Moves, weight: Floats) -> None:
        _add(self.to, items[:, :, None], np.arange(self.devices + 1), moves * weight[:, None, None])
        _add(self.both, items[:, :, None], items[:, None, :], pairs * weight[:, None, None])


def home_rows(problem: PlacementProblem, layer: int, experts: Ints) -> HomeRows:
    """Identical top-k sets of a layer as one row; weights sum to 1, each workload's to its share."""
    ids = np.concatenate([np.sort(routing.topk_ids[:, layer], axis=1) for routing in problem.workloads])
    rows, inverse = np.unique(ids.astype(np.int64), axis=0, return_inverse=True)
    weight = np.bincount(inverse.ravel(), token_weights(problem), minlength=len(rows))
    return HomeRows(rows, weight.astype(np.float64), experts, problem.devices)


def token_weights(problem: PlacementProblem) -> Floats:
    """[tokens of all workloads]: each workload's tokens share its weight; the sum is 1."""
    shares = problem.shares
    return np.concatenate(
        [
            np.full(len(routing.topk_ids), share / len(routing.topk_ids))
            for routing, share in zip(problem.workloads, shares, strict=True)
        ]
    )


def distinct(at: Ints, padding: int) -> Ints:
    """[rows, widest]: the entries of each row once, rising; `padding` is above them all."""
    ordered = np.sort(at, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = padding
    ordered.sort(axis=1)
    return ordered[:, : int((ordered < padding).sum(axis=1).max())]


def device_counts(at: Ints, devices: int) -> Ints:
    """[rows, devices + 1] from the devices of items [rows, width]."""
    flat = np.arange(len(at))[:, None] * (devices + 1) + at
    return np.bincount(flat.ravel(), minlength=len(at) * (devices + 1)).reshape(len(at), devices + 1)


def _rows_of_experts(ids: Ints, num_experts: int) -> list[Ints]:
    order = np.argsort(ids.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(ids.ravel(), minlength=num_experts))
    return list(np.split(order // ids.shape[1], ends[:-1]))


def _add(table: Floats, i: Ints, j: Ints, values: Floats) -> None:
    flat = np.broadcast_to(i * table.shape[1] + j, values.shape)
    table += np.bincount(flat.ravel(), values.ravel(), minlength=table.size).reshape(table.shape)
