"""Traffic under `home`: layers are independent, each is searched and, where small, solved exactly."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.labels import MOST_CELLS, label_layer
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.link_rows import link_rows, traffic_rows
from moecc.solvers.placement.replicas import search_replicas
from moecc.solvers.placement.search import TOLERANCE, Found, reduce_traffic, same_device
from moecc.solvers.placement.start import gathered_start
from moecc.solvers.placement.traffic import home_rows

ROUNDS = 3
HALVINGS = 5


def search_home(work: Work) -> None:
    """Tabu search on every layer: from experts gathered by co-occurrence, from where it stands, from a shaken best;
    with spare slots, in place of the last, rounds that change which experts have replicas.

    Where links differ only the first of these counts devices; then devices are named and experts swapped by what the
    links cost. Without a cap what costs the links nothing is spent on balance at last.
    """
    problem = work.problem
    spare = problem.slots > problem.num_experts
    rounds = 1 if problem.linked else ROUNDS - spare
    # With every expert on a device of its own there is no fan-out to gain.
    gathering = rounds * len(work.layers) if problem.slots_per_device > 1 else 0
    later = [follow_links] * ROUNDS if problem.linked else [search_replicas] * spare
    later += [even_out] if problem.max_imbalance is None else []
    total = gathering + len(work.layers) * len(later)
    costs = [(np.inf, np.inf)] * len(work.layers)
    balanced = [layer.device_of for layer in work.layers]
    for step in range(gathering):
        round_, index = divmod(step, len(work.layers))
        if work.clock.passed(np.inf):
            return
        layer = work.layers[index]
        rows = home_rows(problem, index, layer.experts)
        rng = work.rng(index, 1 + round_)
        begin = balanced[index]
        if round_ == 0:
            begin = gathered_start(rows.ids, rows.weight, layer.experts, problem.devices)
        elif round_ == 2:
            begin = shaken(layer, rng)
        found = reduce_traffic(
            rows,
            layer.table,
            begin,
            cap=float(work.caps[index]),
            budget=5 * problem.slots,
            rng=rng,
            clock=work.clock,
            until=work.clock.slice(total - step),
        )
        if found is not None and _rank(found) < costs[index]:
            costs[index], layer.device_of = _rank(found), found.device_of
        work.tick(step + 1, total)
    for step in range(gathering, total):
        if work.clock.passed(np.inf):
            return
        turn, index = divmod(step - gathering, len(work.layers))
        later[turn](work, index, turn, work.clock.slice(total - step))
        work.tick(step + 1, total)


def _rank(found: Found) -> tuple[float, float]:
    """Traffic first, balance between equals; rounded so that equals compare equal."""
    return round(found.cost, 11), round(found.imbalance, 11)


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


def follow_links(work: Work, index: int, turn: int, until: float) -> None:
    """First name the layer's devices by what their links cost; then swap experts by the same cost, from there or, in
    later turns, from the layer shaken."""
    problem, layer, rng = work.problem, work.layers[index], work.rng(index, 60 + turn)
    if turn == 0:
        label_layer(work, index, until)
    begin = shaken(layer, rng) if turn else layer.device_of
    rows = link_rows(problem, index, layer.experts)
    if rows.ids.size * (problem.devices + 1) > MOST_CELLS:
        note = "too large to swap experts by what links cost: devices were only named by it"
        work.notes += [note] if note not in work.notes else []
        return
    found = reduce_traffic(
        rows,
        layer.table,
        begin,
        cap=float(work.caps[index]),
        budget=5 * problem.slots,
        rng=rng,
        clock=work.clock,
        until=until,
    )
    if found is not None and found.cost < rows.cost(layer.device_of) - TOLERANCE:
        layer.device_of = found.device_of


def even_out(work: Work, index: int, turn: int, until: float) -> None:
    """Lower the layer's imbalance as far as its traffic stays what it is: bisection on a cap."""
    problem, layer = work.problem, work.layers[index]
    rows = traffic_rows(problem, index, layer.experts)
    if rows.ids.size * (problem.devices + 1) > MOST_CELLS:
        return
    low, high = lower_bound(layer.table, problem.slots_per_device), layer.imbalance
    cap, most = low, rows.cost(layer.device_of) + TOLERANCE
    for halving in range(HALVINGS):
        if high <= low + TOLERANCE or work.clock.passed(until):
            return
        found = reduce_traffic(
            rows,
            layer.table,
            layer.device_of,
            cap=cap,
            budget=2 * problem.slots,
            rng=work.rng(index, 90 + turn, halving),
            clock=work.clock,
            until=until,
        )
        if found is not None and found.cost <= most:
            layer.device_of, high = found.device_of, found.imbalance
        else:
            low = cap
        cap = (low + high) / 2


def home_cost(work: Work, index: int) -> float:
    """The traffic of a layer as it stands: the cost of its links, or its fan-out."""
    problem, layer = work.problem, work.layers[index]
    if problem.linked:
        rows = link_rows(problem, index, layer.experts)
        return rows.prices.scale * rows.cost(layer.device_of)
    if problem.slots_per_device == 1:
        return float(problem.top_k)
    return home_rows(problem, index, layer.experts).cost(layer.device_of)


def patterns(work: Work, index: int) -> tuple[Ints, Floats]:
    """Distinct top-k sets [patterns, top_k] of a layer and their weights."""
    rows = home_rows(work.problem, index, work.layers[index].experts)
    return rows.ids, rows.weight
