"""Search from the placement in force under a budget of moved experts: per layer the best assignment for every number
of moves, then the split of the budget over the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints
from moecc.solvers.placement.carry import carried, held_before
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.migrate import Tokens
from moecc.solvers.placement.moves import Held
from moecc.solvers.placement.search import TOLERANCE, Swaps, Tabu, excess, lowest, same_device
from moecc.solvers.placement.traffic import SwapTable, home_rows

PRICES = (1.0, 0.3, 0.0)
"""What a moved expert costs, in units of the first step's gain per move: dear moves find the few that matter."""
OVER = 1e3
"""Price of imbalance over the cap when assignments are compared: first within the cap, then cheap."""
SWEEPS = 3
REPLICA_CHANGES = 8


@dataclass(frozen=True, kw_only=True)
class Point:
    """An assignment of a layer and its score: cost, plus imbalance over the cap at a high price."""

    score: float
    experts: Ints
    device_of: Ints


Frontier = dict[int, Point]
"""Moved experts -> the best assignment met with just so many."""
MakeSwaps = Callable[[Ints, Ints], Swaps]


class LoadSwaps:
    """The imbalance of a layer after every swap; the squares decide between swaps that leave the maximum as it is."""

    def __init__(self, loads: DeviceLoads, device_of: Ints) -> None:
        self.loads, self.device_of = loads, np.append(device_of, loads.sums.shape[1])

    @property
    def cost(self) -> float:
        return self.loads.imbalance

    def changes(self) -> Floats:
        every = np.arange(len(self.device_of) - 1)
        pairs, device_of = (every[:, None], every[None, :]), self.device_of[:-1]
        after, squares = (
            self.loads.after_swaps(*pairs, device_of),
            self.loads.square_changes(*pairs, device_of),
        )
        return np.asarray(after + 0.02 * squares - self.cost)

    def swap(self, u: int, v: int) -> None:
        a, b = int(self.device_of[u]), int(self.device_of[v])
        self.loads.swap(u, v, a, b)
        self.device_of[u], self.device_of[v] = b, a


def start_in_force(work: Work) -> None:
    """Put the placement in force, carried over to the problem's devices, in the place of the greedy start.

    Errors: InputError where even that moves more than the budget allows.
    """
    problem = work.problem
    assert problem.in_force is not None
    kept, moved = held_before(problem, problem.in_force), 0
    work.kept = kept
    for index, (experts, device_of) in enumerate(carried(problem, problem.in_force)):
        work.layers[index].experts, work.layers[index].device_of = experts, device_of
        moved += _moves(kept[index], experts, device_of)
    if problem.max_moves is not None and moved > problem.max_moves:
        need = moved * problem.expert_bytes
        raise InputError(
            f"the new devices and slots alone take {need} moved bytes, max_moved_bytes is {problem.max_moved_bytes:g}",
            where="placement",
            hint=f"allow at least {need} bytes",
        )


def search_within(work: Work) -> None:
    """Improve the placement that stands in `work`, moving at most problem.max_moves experts from the one in force."""
    problem = work.problem
    kept = work.kept
    assert kept is not None
    assert problem.max_moves is not None
    if problem.max_imbalance is not None:
        work.caps = np.full(problem.layers, problem.max_imbalance)
    if problem.execution == "migrate" and problem.objective == "traffic":
        _sweep(work, kept, problem.max_moves)
        return
    frontiers = [_stand(work, index, kept[index]) for index in range(problem.layers)]
    try:
        for index in range(problem.layers):
            explore(
                work,
                index,
                kept[index],
                problem.max_moves,
                frontiers[index],
                _independent(work, index),
                problem.layers - index,
            )
            work.tick(index + 1, problem.layers)
    finally:
        for layer, point in zip(work.layers, split_budget(frontiers, problem.max_moves), strict=True):
            layer.experts, layer.device_of = point.experts, point.device_of


def _independent(work: Work, index: int) -> MakeSwaps:
    """How swaps of a layer are priced where its neighbours do not matter."""
    table = work.layers[index].table

    def make(experts: Ints, device_of: Ints) -> Swaps:
        if work.problem.objective == "load":
            return LoadSwaps(DeviceLoads(table, experts, device_of), device_of)
        return SwapTable(home_rows(work.problem, index, experts), device_of)

    return make


def _stand(work: Work, index: int, kept: Held) -> Frontier:
    """The layer as it stands: the one point that is always there."""
    layer = work.layers[index]
    moves = _moves(kept, layer.experts, layer.device_of)
    return {moves: Point(score=np.inf, experts=layer.experts, device_of=layer.device_of)}


def explore(
    work: Work,
    index: int,
    kept: Held,
    quota: int,
    frontier: Frontier,
    make: MakeSwaps,
    parts_left: int,
) -> None:
    """Add to a layer's frontier what searches with cheaper and cheaper moves meet within `quota` moved experts.

    kept: [experts, devices], what devices hold already.
    """
    layer, until = work.layers[index], work.clock.slice(parts_left)
    starts = [(layer.experts, layer.device_of), *_replica_starts(work, layer, kept, quota)]
    gain: float | None = None
    for turn, start in enumerate(starts):
        for step, price in enumerate(PRICES):
            if work.clock.passed(until):
                return
            experts, begin = start
            if step and len(starts) == 1:
                best = min(frontier.values(), key=lambda point: point.score)
                experts, begin = best.experts, best.device_of
            swaps = make(experts, begin)
            if gain is None:
                gain = max(TOLERANCE, -float(swaps.changes().min()) / 2)
            rng = work.rng(index, 50 + turn, step)
            _descend(work, layer, index, swaps, experts, kept, quota, frontier, price * gain, rng, until)


def _descend(
    work: Work,
    layer: LayerState,
    index: int,
    swaps: Swaps,
    experts: Ints,
    kept: Held,
    quota: int,
    frontier: Frontier,
    price: float,
    rng: np.random.Generator,
    until: float,
) -> None:
    """Tabu search over swaps that stay within the quota; every state met is offered to the frontier."""
    units, cap = len(experts), float(work.caps[index])
    loads, tabu = (
        DeviceLoads(layer.table, experts, swaps.device_of[:-1]),
        Tabu(units, layer.table.devices, rng),
    )
    everyone, idle, over_price, best = np.arange(units), 0, 10.0, np.inf
    new = ~kept[experts]
    while idle <= 2 * units and not work.clock.passed(until):
        device_of = swaps.device_of[:-1]
        moved = new[everyone, device_of]
        total = int(moved.sum())
        over = max(0.0, loads.imbalance - cap)
        score = swaps.cost + OVER * over
        if total <= quota and (total not in frontier or score < frontier[total].score - TOLERANCE):
            frontier[total] = Point(score=score, experts=experts, device_of=device_of.copy())
        value = score + price * total
        best, idle = (value, 0) if value < best - TOLERANCE else (best, idle + 1)
        there = new[:, device_of]
        extra = there.astype(np.int64) + there.T - moved[:, None] - moved[None, :]
        change = swaps.changes() + price * extra
        over_price = min(over_price * 1.1, OVER) if over > TOLERANCE else max(over_price / 1.1, 0.5)
        blocked = same_device(experts, device_of, everyone, layer.table.devices)
        blocked |= total + extra > max(quota, total - 1)
        blocked |= tabu.forbidden(everyone, device_of, idle) & (value + change >= best - TOLERANCE)
        picked = lowest(change + over_price * excess(loads, device_of, cap), blocked)
        if picked is None:
            tabu.until[:] = 0
            idle += units // 4 + 1
            continue
        u, v = picked
        a, b = int(device_of[u]), int(device_of[v])
        swaps.swap(u, v)
        if not isinstance(swaps, LoadSwaps) or swaps.loads is not loads:
            loads.swap(u, v, a, b)
        tabu.leave(u, v, a, b, idle)


def _moves(kept: Held, experts: Ints, device_of: Ints) -> int:
    return int((~kept[experts, device_of]).sum())


def _replica_starts(work: Work, layer: LayerState, kept: Held, quota: int) -> list[tuple[Ints, Ints]]:
    """The layer with 1, 2, 4, 8 ... replicas of light experts replaced by ones of the heaviest, as balance asks."""
    experts, device_of = layer.experts, layer.device_of
    if len(experts) == work.problem.num_experts:
        return []
    starts = []
    for count in range(1, REPLICA_CHANGES + 1):
        changed = _replace_replica(layer, experts, device_of)
        if changed is None or _moves(kept, *changed) > quota:
            break
        experts, device_of = changed
        if count & (count - 1) == 0:
            starts.append(changed)
    return starts


def _replace_replica(layer: LayerState, experts: Ints, device_of: Ints) -> tuple[Ints, Ints] | None:
    """The single replacement that lowers the imbalance most; None if none does."""
    table = layer.table
    before = DeviceLoads(table, experts, device_of).imbalance
    loads = table.loads.mean(axis=0) / np.bincount(experts, minlength=table.loads.shape[1])
    spare = np.flatnonzero(np.bincount(experts, minlength=len(loads))[experts] > 1)
    light = spare[np.argsort(loads[experts[spare]], kind="stable")][:12]
    best: tuple[float, Ints, Ints] | None = None
    for expert in np.argsort(-loads, kind="stable")[:3]:
        holders = device_of[experts == expert]
        for unit in light:
            if device_of[unit] in holders or experts[unit] == expert:
                continue
            new = experts.copy()
            new[unit] = expert
            order = np.lexsort((device_of, new))
            imbalance = DeviceLoads(table, new[order], device_of[order]).imbalance
            if imbalance < (before if best is None else best[0]) - TOLERANCE:
                best = (imbalance, new[order], device_of[order])
    return None if best is None else best[1:]


def split_budget(frontiers: list[Frontier], budget: int) -> list[Point]:
    """The points, one a layer, of the least summed score within the budget: a multiple-choice knapsack by dynamic
    programming over the moves spent. What stands is taken where nothing fits."""
    least = [min(frontier) for frontier in frontiers]
    room = max(0, budget - sum(least))
    useful = [_useful(frontier) for frontier in frontiers]
    room = min(room, sum(max(f) - low for f, low in zip(useful, least, strict=True)))
    total, choices = np.zeros(room + 1), []
    for frontier, low in zip(useful, least, strict=True):
        options = np.full((len(frontier), room + 1), np.inf)
        for row, (moves, point) in enumerate(frontier.items()):
            if (cost := moves - low) <= room:
                options[row, cost:] = total[: room + 1 - cost] + min(point.score, 1e9)
        choices.append(options.argmin(axis=0))
        total = options.min(axis=0)
    points, left = [], room
    for frontier, low, choice in zip(reversed(useful), reversed(least), reversed(choices), strict=True):
        moves, point = list(frontier.items())[choice[left]]
        left -= moves - low
        points.append(point)
    return points[::-1]


def _useful(frontier: Frontier) -> Frontier:
    """Without points that fewer moves beat; the fewest first."""
    kept: Frontier = {}
    best = np.inf
    for moves in sorted(frontier):
        if not kept or frontier[moves].score < best - TOLERANCE:
            kept[moves], best = frontier[moves], frontier[moves].score
    return kept


def _sweep(work: Work, kept: Held, budget: int) -> None:
    """Layer by layer between the landings of its neighbours, with the moves that the other layers leave."""
    tokens, count = Tokens(work), len(work.layers)
    for sweep in range(SWEEPS):
        before = tokens.hops()
        for step, index in enumerate(range(count) if sweep % 2 == 0 else range(count - 1, -1, -1)):
            spent = sum(
                _moves(kept[i], w.experts, w.device_of) for i, w in enumerate(work.layers) if i != index
            )
            quota = budget - spent
            if sweep == 0:
                now = _moves(kept[index], work.layers[index].experts, work.layers[index].device_of)
                quota = now + max(0, quota - now) // max(1, (count - step) // 2 + 1)
            neighbours = [n for n in (index - 1, index + 1) if 0 <= n < count]
            frontier = _stand(work, index, kept[index])

            def make(
                experts: Ints, device_of: Ints, index: int = index, around: list[int] = neighbours
            ) -> Swaps:
                return SwapTable(tokens.rows(work, index, around, experts), device_of)

            explore(work, index, kept[index], quota, frontier, make, (SWEEPS - sweep) * count - step)
            point = min(frontier.values(), key=lambda p: p.score)
            if np.isfinite(point.score):
                work.layers[index].experts, work.layers[index].device_of = point.experts, point.device_of
                tokens.land_anew(work, index)
            work.tick(sweep * count + step + 1, SWEEPS * count)
        if tokens.hops() > before - TOLERANCE:
            break
