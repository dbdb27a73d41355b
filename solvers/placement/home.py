"""Traffic under `home`: layers are independent, each is searched and, where small, solved exactly."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints, LayerLoads
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.search import TOLERANCE, Found, reduce_traffic, same_device
from moecc.solvers.placement.start import gathered_start
from moecc.solvers.placement.traffic import FirstRows, HomeRows, SwapTable, home_rows

ROUNDS = 3


def search_home(work: Work) -> None:
    """Tabu search on every layer: from experts gathered by co-occurrence, from where it stands, from a shaken best."""
    if work.problem.slots_per_device == 1:
        # Every expert is on a device of its own: there is nothing to gain.
        return
    total = ROUNDS * len(work.layers)
    costs = [np.inf] * len(work.layers)
    balanced = [layer.device_of for layer in work.layers]
    for step in range(total):
        round_, index = divmod(step, len(work.layers))
        if work.clock.passed(np.inf):
            return
        layer = work.layers[index]
        rows = home_rows(work.problem, index, layer.experts)
        rng = work.rng(index, 1 + round_)
        begin = balanced[index]
        if round_ == 0:
            begin = gathered_start(rows.ids, rows.weight, layer.experts, work.problem.devices)
        elif round_ == 2:
            begin = shaken(layer, rng)
        found = reduce_traffic(
            rows,
            layer.table,
            begin,
            cap=float(work.caps[index]),
            budget=5 * work.problem.slots,
            rng=rng,
            clock=work.clock,
            until=work.clock.slice(total - step),
        )
        if found is not None and found.cost < costs[index] - TOLERANCE:
            costs[index], layer.device_of = found.cost, found.device_of
        work.tick(step + 1, total)


def shaken(layer: LayerState, rng: np.random.Generator) -> Ints:
    """The layer's assignment after a few random swaps, to leave the neighbourhood of a local optimum."""
    device_of = layer.device_of.copy()
    units = len(device_of)
    for u in rng.permutation(units)[: max(2, units // 6)]:
        here = np.array([u])
        open_ = np.flatnonzero(~same_device(layer.experts, device_of, here, layer.table.devices)[0])
        if len(open_):
            v = rng.choice(open_)
            device_of[u], device_of[v] = device_of[v], device_of[u]
    return device_of


def group_nodes(work: Work) -> None:
    """Relabel every layer's devices so that tokens reach fewer nodes; fan-out and loads stay as they are."""
    problem = work.problem
    nodes = problem.devices // problem.devices_per_node
    if nodes == 1 or problem.devices_per_node == 1:
        return
    if problem.slots_per_device == 1:
        _gather_in_nodes(work, nodes)
        return
    node_of = np.arange(problem.devices) // problem.devices_per_node
    even = LayerLoads(loads=np.ones((1, problem.devices)), shares=np.ones(1), devices=nodes)
    for index, layer in enumerate(work.layers):
        if work.clock.passed(np.inf):
            return
        rows = home_rows(problem, index, layer.experts)
        sets, before = _device_sets(rows, layer.device_of)
        found = reduce_traffic(
            HomeRows(sets, rows.weight, np.arange(problem.devices), nodes),
            even,
            node_of,
            cap=np.inf,
            budget=10 * problem.devices,
            rng=work.rng(index, 99),
            clock=work.clock,
            until=work.clock.slice(len(work.layers) - index),
        )
        if found is not None:
            _relabel(layer, rows, found, before)


def _gather_in_nodes(work: Work, nodes: int) -> None:
    """One unit a device: units are searched over nodes directly, from experts gathered by co-occurrence."""
    problem = work.problem
    even = LayerLoads(
        loads=np.full((1, problem.num_experts), nodes / problem.num_experts), shares=np.ones(1), devices=nodes
    )
    for index, layer in enumerate(work.layers):
        if work.clock.passed(np.inf):
            return
        cover = home_rows(problem, index, layer.experts)
        rows = FirstRows(cover.ids, cover.weight, layer.experts, nodes)
        now = layer.device_of // problem.devices_per_node
        found = reduce_traffic(
            rows,
            even,
            gathered_start(rows.ids, rows.weight, layer.experts, nodes),
            cap=np.inf,
            budget=10 * problem.devices,
            rng=work.rng(index, 99),
            clock=work.clock,
            until=work.clock.slice(len(work.layers) - index),
        )
        if found is not None and found.cost < SwapTable(rows, now).cost - TOLERANCE:
            layer.device_of = np.argsort(np.argsort(found.device_of, kind="stable"))
        work.tick(index + 1, len(work.layers))


def _relabel(layer: LayerState, rows: HomeRows, found: Found, before: float) -> None:
    label = np.empty(len(found.device_of), np.int64)
    label[np.argsort(found.device_of, kind="stable")] = np.arange(len(label))
    device_of = label[layer.device_of]
    # The greedy cover of replicas breaks ties by device number, so new labels can change the fan-out.
    if rows.single or _device_sets(rows, device_of)[1] <= before + TOLERANCE:
        layer.device_of = device_of


def _device_sets(rows: HomeRows, device_of: Ints) -> tuple[Ints, float]:
    """[rows, widest]: the devices each row reaches, padded with D; and the weighted fan-out."""
    look = rows.look(np.arange(len(rows.ids)), np.append(device_of, rows.devices))
    reached = np.zeros((len(look.items), rows.devices), np.bool_)
    np.put_along_axis(reached, device_of[look.items], True, 1)
    width = int(reached.sum(axis=1).max())
    order = np.argsort(~reached, axis=1, kind="stable")[:, :width]
    held = np.take_along_axis(reached, order, 1)
    return np.where(held, order, rows.devices), float(rows.weight @ look.cost)


def fan_out(work: Work, index: int) -> float:
    """The weighted fan-out of a layer as it stands."""
    if work.problem.slots_per_device == 1:
        return float(work.problem.top_k)
    layer = work.layers[index]
    rows = home_rows(work.problem, index, layer.experts)
    return _device_sets(rows, layer.device_of)[1]


def patterns(work: Work, index: int) -> tuple[Ints, Floats]:
    """Distinct top-k sets [patterns, top_k] of a layer and their weights."""
    rows = home_rows(work.problem, index, work.layers[index].experts)
    return rows.ids, rows.weight
