"""Search from the placement in force under a budget of moved experts: per layer the best assignment for every number
of moves, then the split of the budget over the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints
from moecc.solvers.placement.carry import carried, held_before
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.link_rows import traffic_rows
from moecc.solvers.placement.migrate import Tokens
from moecc.solvers.placement.moves import Held
from moecc.solvers.placement.search import TOLERANCE, Swaps, Tabu, excess, lowest, same_device
from moecc.solvers.placement.served import loads_of
from moecc.solvers.placement.start import replicate
from moecc.solvers.placement.step import StepSwaps, rates, step_rows
from moecc.solvers.placement.traffic import SwapTable

PRICES = (1.0, 0.3, 0.0)
"""What a moved expert costs, in units of the first step's gain per move: dear moves find the few that matter."""
OVER = 1e3
"""Price of imbalance over the cap when assignments are compared: first within the cap, then cheap."""
SWEEPS = 3
REPLICA_CHANGES = 16
DEAREST = 1e9

MakeSwaps = Callable[[Ints, Ints], Swaps]
"""From the experts and devices of units."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An assignment of a layer and its score: cost, plus imbalance over the cap at a high price."""

    score: float
    experts: Ints
    device_of: Ints


Frontier = dict[int, Point]
"""Moved experts -> the best assignment met with just so many."""


class LoadSwaps:
    """The imbalance of a layer after every swap; the squares decide between swaps that leave the maximum as it is."""

    def __init__(self, loads: DeviceLoads, device_of: Ints) -> None:
        self.loads, self.device_of = loads, np.append(device_of, loads.sums.shape[1])

    @property
    def cost(self) -> float:
        return self.loads.imbalance

    def changes(self) -> Floats:
        """Swaps with a fullest device: no other lowers the maximum; the rest are infinite."""
        at = self.device_of[:-1]
        rows, every = np.flatnonzero(self.loads.fullest()[at]), np.arange(len(at))
        pairs = (rows[:, None], every[None, :])
        after, squares = self.loads.after_swaps(*pairs, at), self.loads.square_changes(*pairs, at)
        change = np.full((len(at), len(at)), np.inf)
        change[rows] = after + 0.02 * squares - self.cost
        return change

    def swap(self, u: int, v: int) -> None:
        a, b = int(self.device_of[u]), int(self.device_of[v])
        self.loads.swap(u, v, a, b)
        self.device_of[u], self.device_of[v] = b, a


def start_in_force(work: Work) -> None:
    """Put the placement in force, carried over to the problem's devices, in the place of the greedy start.

    Errors: InputError where even that moves more than the budget allows.
    """
    problem = work.problem
    assert problem.in_force is not None, "PlacementProblem lets no budget without it pass"
    work.kept, moved = held_before(problem, problem.in_force), 0
    for index, (experts, device_of) in enumerate(carried(problem, problem.in_force)):
        work.layers[index].experts, work.layers[index].device_of = experts, device_of
        moved += _moves(work.kept[index], experts, device_of)
    if problem.max_moves is not None and moved > problem.max_moves:
        need = moved * problem.expert_bytes
        raise InputError(
            f"the new devices and slots alone take {need} moved bytes, max_moved_bytes is {problem.max_moved_bytes:g}",
            where="placement",
            hint=f"allow at least {need} bytes",
        )


def search_within(work: Work) -> None:
    """Improve the placement that stands in `work`, moving at most problem.max_moves experts from the one in force."""
    problem, kept = work.problem, work.kept
    assert kept is not None, "start_in_force comes first"
    quota = problem.max_moves or 0
    if problem.max_imbalance is not None:
        work.caps = np.full(problem.layers, problem.max_imbalance)
    if problem.execution == "migrate" and problem.objective == "traffic":
        _sweep(work, kept, quota)
        return
    searches = [
        LayerSearch(work=work, index=i, kept=kept[i], quota=quota, make=_independent(work, i))
        for i in range(problem.layers)
    ]
    total = len(PRICES) * len(searches)
    try:
        for step in range(total):
            turn, index = divmod(step, len(searches))
            searches[index].run(turn, work.clock.slice(total - step))
            work.tick(step + 1, total)
    finally:
        points = split_budget([search.frontier for search in searches], quota)
        for layer, point in zip(work.layers, points, strict=True):
            layer.experts, layer.device_of = point.experts, point.device_of


def _independent(work: Work, index: int) -> MakeSwaps:
    """How swaps of a layer are priced where its neighbours do not matter."""
    problem, table = work.problem, work.layers[index].table

    def make(experts: Ints, device_of: Ints) -> Swaps:
        if problem.objective == "load":
            return LoadSwaps(loads_of(table, experts, device_of), device_of)
        if problem.objective == "step":
            return StepSwaps(step_rows(problem, index, experts), table, rates(problem), device_of)
        return SwapTable(traffic_rows(problem, index, experts), device_of)

    return make


@dataclass(kw_only=True)
class LayerSearch:
    """One layer within `quota` moved experts. kept: [experts, devices], what devices hold already; frontier: what was
    met so far, in the beginning the layer as it stands."""

    work: Work
    index: int
    kept: Held
    quota: int
    make: MakeSwaps
    frontier: Frontier = field(default_factory=dict)
    gain: float | None = None

    def __post_init__(self) -> None:
        layer = self.layer
        moves = _moves(self.kept, layer.experts, layer.device_of)
        self.frontier[moves] = Point(score=np.inf, experts=layer.experts, device_of=layer.device_of)

    @property
    def layer(self) -> LayerState:
        return self.work.layers[self.index]

    @property
    def best(self) -> Point:
        return min(self.frontier.values(), key=lambda point: point.score)

    def run(self, turn: int, until: float) -> None:
        """Search at the turn's price: first from where the layer stands and from within its cap, later from the best
        point; from each also with other replicas."""
        best = (self.best.experts, self.best.device_of)
        starts = self._starts() if turn == 0 else [best, *self._replica_starts(*best)]
        for number, (experts, device_of) in enumerate(starts):
            if self.work.clock.passed(until):
                return
            swaps = self.make(experts, device_of)
            if self.gain is None:
                self.gain = max(TOLERANCE, -float(swaps.changes().min()) / 2)
            rng = self.work.rng(self.index, 50 + turn, number)
            self._descend(swaps, experts, PRICES[turn] * self.gain, rng, until)

    def _starts(self) -> list[tuple[Ints, Ints]]:
        layer, cap = self.layer, float(self.work.caps[self.index])
        starts = [(layer.experts, layer.device_of)]
        starts += self._replica_starts(layer.experts, layer.device_of)
        if layer.imbalance <= cap or self.work.problem.objective == "load":
            return starts
        even = LayerSearch(
            work=self.work, index=self.index, kept=self.kept, quota=self.quota, make=self._even
        )
        within = []
        for number, (experts, device_of) in enumerate(starts):
            even._descend(
                even.make(experts, device_of), experts, 0.0, self.work.rng(self.index, 49, number), np.inf
            )
            met = [m for m, point in even.frontier.items() if point.score <= cap + TOLERANCE]
            point = even.frontier[min(met)] if met else even.best
            within.append((point.experts, point.device_of))
        return [*within[:1], *starts]

    def _replica_starts(self, experts: Ints, device_of: Ints) -> list[tuple[Ints, Ints]]:
        """With replicas counted as loads ask, and with 1, 2, 4 ... of light experts replaced by ones of the heaviest
        while balance gains."""
        starts: list[tuple[Ints, Ints]] = []
        if len(experts) == self.work.problem.num_experts:
            return starts
        counted = _count_anew(self.layer, experts, device_of)
        if _moves(self.kept, *counted) <= self.quota:
            starts.append(counted)
        for count in range(1, REPLICA_CHANGES + 1):
            changed = _replace_replica(self.layer, experts, device_of)
            if changed is None or _moves(self.kept, *changed) > self.quota:
                break
            experts, device_of = changed
            if count & (count - 1) == 0:
                starts.append(changed)
        return starts

    def _even(self, experts: Ints, device_of: Ints) -> Swaps:
        return LoadSwaps(loads_of(self.layer.table, experts, device_of), device_of)

    def _descend(
        self, swaps: Swaps, experts: Ints, price: float, rng: np.random.Generator, until: float
    ) -> None:
        """Tabu search over swaps that stay within the quota; every assignment met is offered to the frontier."""
        units, table, cap = len(experts), self.layer.table, float(self.work.caps[self.index])
        if isinstance(swaps, LoadSwaps):
            cap = np.inf
        loads = loads_of(table, experts, swaps.device_of[:-1])
        tabu, everyone, new = Tabu(units, table.devices, rng), np.arange(units), ~self.kept[experts]
        idle, step, over_price, best = 0, 0, 10.0, np.inf
        while idle <= 2 * units and not self.work.clock.passed(until):
            step += 1
            device_of = swaps.device_of[:-1]
            moved = new[everyone, device_of].astype(np.int64)
            total, over = int(moved.sum()), max(0.0, loads.imbalance - cap)
            score = swaps.cost + OVER * over
            self._offer(total, score, experts, device_of)
            value = score + price * total
            best, idle = (value, 0) if value < best - TOLERANCE else (best, idle + 1)
            there = new[:, device_of].astype(np.int64)
            extra = there + there.T - moved[:, None] - moved[None, :]
            change = swaps.changes() + price * extra
            over_price = min(over_price * 1.1, OVER) if over > TOLERANCE else max(over_price / 1.1, 0.5)
            blocked = same_device(experts, device_of, everyone, table.devices)
            blocked |= total + extra > max(self.quota, total - 1)
            blocked |= tabu.forbidden(everyone, device_of, step) & (value + change >= best - TOLERANCE)
            picked = lowest(change + over_price * excess(loads, device_of, cap), blocked)
            if picked is None:
                tabu.until[:] = 0
                idle += units // 4 + 1
                continue
            u, v = picked
            a, b = int(device_of[u]), int(device_of[v])
            swaps.swap(u, v)
            loads.swap(u, v, a, b)
            tabu.leave(u, v, a, b, step)

    def _offer(self, moves: int, score: float, experts: Ints, device_of: Ints) -> None:
        if moves <= self.quota and (
            moves not in self.frontier or score < self.frontier[moves].score - TOLERANCE
        ):
            self.frontier[moves] = Point(score=score, experts=experts, device_of=device_of.copy())


def _moves(kept: Held, experts: Ints, device_of: Ints) -> int:
    return int((~kept[experts, device_of]).sum())


def _count_anew(layer: LayerState, experts: Ints, device_of: Ints) -> tuple[Ints, Ints]:
    """Surplus replicas, those on the fullest devices first, replaced by ones of experts that have too few."""
    table = layer.table
    wanted = replicate(table.shares @ table.loads, len(experts), table.devices)
    lack = np.bincount(wanted, minlength=table.loads.shape[1]) - np.bincount(
        experts, minlength=table.loads.shape[1]
    )
    new, sums = experts.copy(), loads_of(table, experts, device_of).sums.sum(axis=0)
    for unit in np.argsort(-sums[device_of], kind="stable"):
        if lack[new[unit]] >= 0:
            continue
        here = new[device_of == device_of[unit]]
        gaining = np.flatnonzero(lack > 0)
        gaining = gaining[~np.isin(gaining, here)]
        if len(gaining):
            lack[new[unit]] += 1
            new[unit] = gaining[0]
            lack[new[unit]] -= 1
    order = np.lexsort((device_of, new))
    return new[order], device_of[order]


def _replace_replica(layer: LayerState, experts: Ints, device_of: Ints) -> tuple[Ints, Ints] | None:
    """The single replacement that lowers the imbalance most; None if none does."""
    table = layer.table
    counts = np.bincount(experts, minlength=table.loads.shape[1])
    loads = table.loads.mean(axis=0) / counts
    spare = np.flatnonzero(counts[experts] > 1)
    light = spare[np.argsort(loads[experts[spare]], kind="stable")][:12]
    lowest_, best = loads_of(table, experts, device_of).imbalance, None
    for expert in np.argsort(-loads, kind="stable")[:3]:
        holders = device_of[experts == expert]
        for unit in light[~np.isin(device_of[light], holders)]:
            new = experts.copy()
            new[unit] = expert
            order = np.lexsort((device_of, new))
            imbalance = loads_of(table, new[order], device_of[order]).imbalance
            if imbalance < lowest_ - TOLERANCE:
                lowest_, best = imbalance, (new[order], device_of[order])
    return best


def split_budget(frontiers: list[Frontier], budget: int) -> list[Point]:
    """The points, one a layer, of the least summed score within the budget: a multiple-choice knapsack by dynamic
    programming over the moves spent. The frontiers' fewest moves must fit it."""
    useful = [_useful(frontier) for frontier in frontiers]
    least = [min(frontier) for frontier in useful]
    room = min(budget - sum(least), sum(max(f) - low for f, low in zip(useful, least, strict=True)))
    total, choices = np.zeros(room + 1), []
    for frontier, low in zip(useful, least, strict=True):
        options = np.full((len(frontier), room + 1), np.inf)
        for row, (moves, point) in enumerate(frontier.items()):
            if (cost := moves - low) <= room:
                options[row, cost:] = total[: room + 1 - cost] + min(point.score, DEAREST)
        choices.append(options.argmin(axis=0))
        total = options.min(axis=0)
    points, left = [], room
    for frontier, low, choice in zip(reversed(useful), reversed(least), reversed(choices), strict=True):
        moves, point = list(frontier.items())[choice[left]]
        left -= moves - low
        points.append(point)
    return points[::-1]


def _useful(frontier: Frontier) -> Frontier:
    """Without points that fewer moves match; the fewest first."""
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
        for step in range(count):
            index = step if sweep % 2 == 0 else count - 1 - step
            spent = [_moves(kept[i], w.experts, w.device_of) for i, w in enumerate(work.layers)]
            left = budget - sum(spent)
            # In the first sweep the layers still to come keep most of what is left.
            share = left if sweep else 2 * left // (count - step + 1)
            search = LayerSearch(
                work=work,
                index=index,
                kept=kept[index],
                quota=spent[index] + share,
                make=_between(work, tokens, index),
            )
            for turn in range(len(PRICES)):
                search.run(turn, work.clock.slice(((SWEEPS - sweep) * count - step) * len(PRICES) - turn))
            if np.isfinite(search.best.score):
                work.layers[index].experts = search.best.experts
                work.layers[index].device_of = search.best.device_of
                tokens.land_anew(work, index)
            work.tick(sweep * count + step + 1, SWEEPS * count)
        if tokens.hops() > before - TOLERANCE:
            break


def _between(work: Work, tokens: Tokens, index: int) -> MakeSwaps:
    neighbours = [n for n in (index - 1, index + 1) if 0 <= n < len(work.layers)]

    def make(experts: Ints, device_of: Ints) -> Swaps:
        return SwapTable(tokens.rows(work, index, neighbours, experts), device_of)

    return make
