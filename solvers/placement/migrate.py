"""Traffic under `migrate`: all layers annealed together, then each searched between the landings of its neighbours."""

from __future__ import annotations

import itertools

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.chain import Singles, anneal, follow_table, pull
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.search import TOLERANCE, reduce_cost
from moecc.solvers.placement.traffic import MigrateRows, SwapTable, token_weights

SWEEPS = 4
ANNEALING = 0.35
"""Share of the time left for the first phase, on a machine too slow to end it sooner."""
PAIRS = 3.0
"""Hops that a share of 1 of the pairs of experts is worth. DeepSeek-V2-Lite's traces, 8 devices, held-out sequences: a
search for hops alone ended at 0.338 hops, 0.218 of the pairs and 4.16 devices per token and layer; with 3, at 0.396,
0.287 and 3.61. A token's copies, hops and fetches from other devices together, fall from 3.49 to 3.01."""
STARTS = 8


class Tokens:
    """The tokens of all workloads, and where they land in every layer as placed so far."""

    def __init__(self, work: Work) -> None:
        self.ids = np.concatenate([routing.topk_ids for routing in work.problem.workloads])
        self.weight = token_weights(work.problem)
        self.land = np.stack(
            [self.rows(work, index, []).landing(_padded(work, index)) for index in range(len(work.layers))]
        )

    def rows(self, work: Work, index: int, neighbours: list[int], experts: Ints | None = None) -> MigrateRows:
        """The layer's tokens between the landings of neighbours, with the units of `experts` or its own."""
        at = self.land[neighbours].T if neighbours else np.empty((len(self.ids), 0), np.int64)
        ids = self.ids[:, index].astype(np.int64)
        experts = work.layers[index].experts if experts is None else experts
        return MigrateRows(ids, self.weight, experts, work.problem.devices, at)

    def land_anew(self, work: Work, index: int) -> None:
        """After the layer's experts moved."""
        self.land[index] = self.rows(work, index, []).landing(_padded(work, index))

    def hops(self) -> float:
        """Landing changes per token, summed over transitions."""
        return float(((self.land[1:] != self.land[:-1]) @ self.weight).sum())


def search_migrate(work: Work) -> None:
    """Experts of all layers gathered by the pairs that tokens choose one after the other, then sweeps back and forth
    that lower hops, and hold on to the pairs, until one gains nothing; devices that tokens move between share a node.

    Pairs guide because hops alone are cheap to fake: tokens that all land on one device for one expert make no hop, but
    fetch the others (see PAIRS).
    """
    count = len(work.layers)
    if count == 1:
        return
    total, table = (SWEEPS + 1) * count, follow_table(work)
    begun, value = [layer.device_of for layer in work.layers], _value(work, table)
    anneal(work, table, ANNEALING)
    over = {i for i, layer in enumerate(work.layers) if layer.imbalance > work.caps[i] + TOLERANCE}
    try:
        work.tick(count, total)
        _sweep(work, table, over, total)
    finally:
        # A layer that no search brought within its cap goes back to where it was; so do all if the time was too short.
        for index in over:
            work.layers[index].device_of = begun[index]
        if _value(work, table) > value:
            for layer, device_of in zip(work.layers, begun, strict=True):
                layer.device_of = device_of
    work.tick(total, total)


def _sweep(work: Work, table: Singles, over: set[int], total: int) -> None:
    """over: the layers beyond their caps; those that a search mended leave it."""
    tokens, count, before = Tokens(work), len(work.layers), np.inf
    for sweep in range(SWEEPS):
        for step in range(count):
            index = step if sweep % 2 else count - 1 - step
            if work.clock.passed(np.inf):
                return
            if _improve(work, tokens, table, index, (SWEEPS - sweep) * count - step, sweep):
                over.discard(index)
            work.tick((sweep + 1) * count + step + 1, total)
        after = tokens.hops() - PAIRS * _paired(work, table)
        if after > before - TOLERANCE:
            break
        before = after


def _value(work: Work, table: Singles) -> float:
    """What the search lowers, summed over transitions."""
    return Tokens(work).hops() - PAIRS * _paired(work, table)


class _PairedSwaps(SwapTable):
    """Hops less PAIRS times the pairs; worth: [units, devices], what pairs a unit brings to each device."""

    def __init__(self, rows: MigrateRows, device_of: Ints, worth: Floats) -> None:
        super().__init__(rows, device_of)
        self.price = -PAIRS * worth

    @property
    def cost(self) -> float:
        units = np.arange(self.units)
        return super().cost + float(self.price[units, self.device_of[:-1]].sum())

    def changes(self) -> Floats:
        there = self.price[:, self.device_of[:-1]]
        moved = there - there.diagonal()[:, None]
        return super().changes() + moved + moved.T


def _improve(work: Work, tokens: Tokens, table: Singles, index: int, parts_left: int, sweep: int) -> bool:
    """Search one layer between its neighbours and let its tokens land anew; False if the cap was never met."""
    layer, count = work.layers[index], len(work.layers)
    rows = tokens.rows(work, index, [n for n in (index - 1, index + 1) if 0 <= n < count])
    found = reduce_cost(
        _PairedSwaps(rows, layer.device_of, pull(work, table, index)),
        layer.experts,
        layer.table,
        cap=float(work.caps[index]),
        budget=4 * work.problem.slots,
        rng=work.rng(index, 2 + sweep),
        clock=work.clock,
        until=work.clock.slice(parts_left),
    )
    if found is None:
        return False
    layer.device_of = found.device_of
    tokens.land_anew(work, index)
    return True


def _paired(work: Work, table: Singles) -> float:
    """Pairs on one device, summed over transitions."""
    each = (
        pull(work, table, index)[np.arange(len(layer.experts)), layer.device_of].sum()
        for index, layer in enumerate(work.layers)
    )
    # Every transition was counted from both of its layers.
    return float(sum(each)) / 2


def join_nodes(work: Work) -> None:
    """One renaming of the devices of all layers so that hops stay within nodes; hops are not given up for it."""
    problem = work.problem
    nodes = problem.devices // problem.devices_per_node
    if nodes == 1 or problem.devices_per_node == 1 or problem.layers == 1:
        return
    tokens = Tokens(work)
    flows = np.zeros((problem.devices, problem.devices))
    for before, after in itertools.pairwise(tokens.land):
        np.add.at(flows, (before, after), tokens.weight)
    name = grouped(flows + flows.T, problem.devices_per_node, work.rng(0, 97))
    saved, hops = [layer.device_of for layer in work.layers], tokens.hops()
    crossings = _crossings(tokens, problem.devices_per_node)
    better = False
    try:
        for index, layer in enumerate(work.layers):
            layer.device_of = name[layer.device_of]
            tokens.land_anew(work, index)
        # Landings break ties by device number, so a new name can change them.
        crossed = _crossings(tokens, problem.devices_per_node)
        better = tokens.hops() <= hops + TOLERANCE and crossed < crossings
    finally:
        if not better:
            for layer, device_of in zip(work.layers, saved, strict=True):
                layer.device_of = device_of


def grouped(flows: Floats, size: int, rng: np.random.Generator) -> Ints:
    """[devices]: new names so that consecutive `size` names hold what flows among them; flows: symmetric.

    The best of some starts, each improved by the best exchange of two until none helps (Kernighan and Lin, 1970).
    """
    devices = len(flows)
    flows = flows * (1 - np.eye(devices))
    best, best_inside = np.arange(devices), -np.inf
    for start in range(STARTS):
        node = np.arange(devices) // size
        if start:
            node = rng.permutation(node)
        while True:
            to = flows @ np.eye(devices // size)[node]
            gain = to[:, node] - to[np.arange(devices), node][:, None]
            gain = np.where(node[:, None] == node, -np.inf, gain + gain.T - 2 * flows)
            u, v = divmod(int(gain.argmax()), devices)
            if gain[u, v] <= TOLERANCE:
                break
            node[[u, v]] = node[[v, u]]
        inside = float(to[np.arange(devices), node].sum())
        if inside > best_inside + TOLERANCE:
            best, best_inside = np.argsort(np.argsort(node, kind="stable"), kind="stable"), inside
    return best


def _crossings(tokens: Tokens, devices_per_node: int) -> float:
    node = tokens.land // devices_per_node
    return float(((node[1:] != node[:-1]) @ tokens.weight).sum())


def summed_hops(work: Work) -> float:
    """Landing changes per token as placed, summed over transitions."""
    return Tokens(work).hops()


def _padded(work: Work, index: int) -> Ints:
    return np.append(work.layers[index].device_of, work.problem.devices)
