"""Which device each group of experts goes to: `home` sees groups first, then names devices by what their links cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints, LayerLoads
from moecc.solvers.placement.carry import best_assignment
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.link_rows import LinkRows, link_rows
from moecc.solvers.placement.search import TOLERANCE, reduce_traffic
from moecc.solvers.placement.start import gathered_start
from moecc.solvers.placement.traffic import FirstRows, HomeRows, SwapTable, distinct

SCALED = 2**36
"""Prices as integers, for the assignment: finer than any measurement."""
MOST_CELLS = 2**27
"""Entries of the largest table of label swaps: 0.5 GiB of float32."""


def label_devices(work: Work) -> None:
    """Rename every layer's devices so that its tokens' copies cost the links less; groups stay as they are."""
    for index in range(len(work.layers)):
        if work.clock.passed(np.inf):
            return
        label_layer(work, index, work.clock.slice(len(work.layers) - index))


def label_layer(work: Work, index: int, until: float) -> None:
    """Gather groups in nodes, then the exact assignment of nodes and of the devices in them, then swaps of labels.

    Among links of equal price the nodes are all that matters; with one node, or one device a node, the assignment
    alone is the optimum of what the groups allow (without replicas, whose cover breaks ties by device number).
    """
    problem, layer = work.problem, work.layers[index]
    per_node, nodes = problem.devices_per_node, problem.devices // problem.devices_per_node
    rows = link_rows(problem, index, layer.experts)
    tiered = nodes > 1 and per_node > 1
    if tiered:
        gather = _gather_units if problem.slots_per_device == 1 else _gather_groups
        _keep_cheaper(work, index, rows, gather(work, index, rows, until))
    if rows.prices.even or work.clock.passed(until):
        return
    sets = rows.reached(layer.device_of)
    label = nested_assignment(rows, sets, per_node)
    if tiered and sets.size * (problem.devices + 1) <= MOST_CELLS:
        label = _swapped(work, index, rows, sets, label, until)
    _keep_cheaper(work, index, rows, label[layer.device_of])


def nested_assignment(rows: LinkRows, sets: Ints, per_node: int) -> Ints:
    """[devices]: the device of every group, the cheapest that keeps the groups of a node together.

    sets: [rows, width] groups that rows reach, padded with the number of groups. The cost of a group at a device and
    that of a node's groups at a node add up, so an assignment of nodes over assignments within them is exact.
    """
    prices, size = rows.prices, rows.devices
    nodes, within = size // per_node, np.arange(per_node)
    visits = _visits(rows, sets, size)
    node_visits = _visits(rows, distinct(prices.node_of[sets], nodes), nodes)
    at_device = visits.T @ prices.device[:, :-1]
    at_node = node_visits.T @ prices.node[:, :-1]
    inner = {}
    for block in range(nodes):
        for node in range(nodes):
            here = (
                slice(block * per_node, (block + 1) * per_node),
                slice(node * per_node, (node + 1) * per_node),
            )
            inner[block, node] = cheapest(at_device[here])
            at_node[block, node] += at_device[here][within, inner[block, node]].sum()
    label = np.empty(size, np.int64)
    for block, node in enumerate(cheapest(at_node)):
        label[block * per_node + within] = node * per_node + inner[block, int(node)]
    return label


def cheapest(costs: Floats) -> Ints:
    """[n]: the column of every row so that the costs [n, n] add up to the least, but for rounding to 1 / SCALED."""
    if len(costs) == 1:
        return np.zeros(1, np.int64)
    least = costs - costs.min(axis=1, keepdims=True)
    largest = float(least.max())
    if largest <= 0:
        return np.arange(len(costs))
    return best_assignment(-np.rint(least / largest * SCALED).astype(np.int64))


def _visits(rows: LinkRows, sets: Ints, size: int) -> Floats:
    """[rows of prices, size]: the weight of rows of a home that reach each entry."""
    homes = len(rows.prices.device)
    flat = rows.home[:, None] * (size + 1) + sets
    weight = np.broadcast_to(rows.weight[:, None], sets.shape)
    summed = np.bincount(flat.ravel(), weight.ravel(), minlength=homes * (size + 1))
    return np.asarray(summed.reshape(homes, size + 1)[:, :size], np.float64)


def _gather_groups(work: Work, index: int, rows: LinkRows, until: float) -> Ints:
    """The layer's devices renamed so that tokens reach fewer nodes."""
    problem, layer = work.problem, work.layers[index]
    nodes = problem.devices // problem.devices_per_node
    sets = rows.reached(layer.device_of)
    found = reduce_traffic(
        HomeRows(sets, rows.weight, np.arange(problem.devices), nodes),
        _no_loads(problem.devices, nodes),
        rows.prices.node_of[:-1],
        cap=np.inf,
        budget=10 * problem.devices,
        rng=work.rng(index, 99),
        clock=work.clock,
        until=until,
    )
    if found is None:
        return layer.device_of
    return _in_order_of(found.device_of)[layer.device_of]


def _gather_units(work: Work, index: int, rows: LinkRows, until: float) -> Ints:
    """One unit a device: units are searched over nodes directly, from experts gathered by co-occurrence."""
    problem, layer = work.problem, work.layers[index]
    nodes = problem.devices // problem.devices_per_node
    over_nodes = FirstRows(rows.ids, rows.weight, layer.experts, nodes)
    found = reduce_traffic(
        over_nodes,
        _no_loads(problem.num_experts, nodes),
        gathered_start(rows.ids, rows.weight, layer.experts, nodes),
        cap=np.inf,
        budget=10 * problem.devices,
        rng=work.rng(index, 99),
        clock=work.clock,
        until=until,
    )
    now = SwapTable(over_nodes, layer.device_of // problem.devices_per_node).cost
    if found is None or found.cost >= now - TOLERANCE:
        return layer.device_of
    return _in_order_of(found.device_of)


def _swapped(work: Work, index: int, rows: LinkRows, sets: Ints, label: Ints, until: float) -> Ints:
    """Labels after swaps of two devices; a group counts as an expert that its device holds alone."""
    size = work.problem.devices
    found = reduce_traffic(
        LinkRows(sets, rows.weight, np.arange(size), size, rows.prices, rows.home),
        _no_loads(size, size),
        label,
        cap=np.inf,
        budget=10 * size,
        rng=work.rng(index, 98),
        clock=work.clock,
        until=until,
    )
    return label if found is None else found.device_of


def _no_loads(units: int, devices: int) -> LayerLoads:
    return LayerLoads(loads=np.full((1, units), devices / units), shares=np.ones(1), devices=devices)


def _in_order_of(node_of: Ints) -> Ints:
    """[n]: a number for each, those of the first node first."""
    number = np.empty(len(node_of), np.int64)
    number[np.argsort(node_of, kind="stable")] = np.arange(len(node_of))
    return number


def _keep_cheaper(work: Work, index: int, rows: LinkRows, device_of: Ints) -> None:
    """Take the assignment if its links cost less; its loads differ where replicas serve what is near to them."""
    layer = work.layers[index]
    if rows.cost(device_of) >= rows.cost(layer.device_of) - TOLERANCE:
        return
    most = (
        layer.imbalance if work.problem.objective == "load" else max(float(work.caps[index]), layer.imbalance)
    )
    if replace(layer, device_of=device_of).imbalance <= most + TOLERANCE:
        layer.device_of = device_of
