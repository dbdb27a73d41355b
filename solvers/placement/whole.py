"""Proven optima where device numbers matter: all placements of small layers, by link cost and imbalance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.enumerate import Holds, all_layers, cover, units_of
from moecc.solvers.placement.home import home_cost
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.link_rows import link_rows
from moecc.solvers.placement.lp import lp_peaks
from moecc.solvers.placement.near import served
from moecc.solvers.placement.search import TOLERANCE
from moecc.solvers.placement.traffic import home_rows

MAX_CELLS = 400_000_000
"""Entries that a layer's placements fill: a few seconds of work."""
MAX_FRONT = 100_000
CHUNK = 2000


@dataclass(frozen=True, kw_only=True)
class Front:
    """Placements of some layers that nothing beats in both figures, by rising imbalance: each summed over the layers.

    which: [placements, layers], rows of all_layers.
    """

    imbalance: Floats
    cost: Floats
    which: Ints


def prove_whole(work: Work) -> bool:
    """The best placement of every layer, under a cap on their mean imbalance of all together, and the proof of it.

    Between equal ones the more even wins. False if that is too large, or the clock does not allow it.
    """
    problem = work.problem
    holds = all_layers(problem.num_experts, problem.devices, problem.slots_per_device)
    if holds is None or not all(_fits(work, index, holds) for index in range(problem.layers)):
        return False
    front: Front | None = None
    for index in range(problem.layers):
        if work.clock.passed(np.inf):
            return False
        own = _front(work, index, holds)
        if problem.max_imbalance is None or problem.objective == "load":
            _take_cheapest(work, index, holds, own)
        else:
            front = own if front is None else _joined(front, own)
            if len(front.cost) > MAX_FRONT:
                return False
        work.tick(index + 1, problem.layers)
    if front is not None:
        _take_within(work, holds, front)
    return True


def _fits(work: Work, index: int, holds: Holds) -> bool:
    rows = link_rows(work.problem, index, work.layers[index].experts)
    return len(holds) * work.problem.devices * max(rows.ids.size, work.problem.num_experts) <= MAX_CELLS


def _front(work: Work, index: int, holds: Holds) -> Front:
    imbalance = np.concatenate(
        [_imbalances(work, index, holds[i : i + CHUNK]) for i in range(0, len(holds), CHUNK)]
    )
    cost = np.concatenate([_costs(work, index, holds[i : i + CHUNK]) for i in range(0, len(holds), CHUNK)])
    if work.problem.objective == "load":
        cost = imbalance
    return _beaten_by_none(imbalance, cost, np.arange(len(holds))[:, None])


def _imbalances(work: Work, index: int, holds: Holds) -> Floats:
    """[placements]."""
    table, (count, experts, devices) = work.layers[index].table, holds.shape
    if table.lp:
        holders = holds @ (1 << np.arange(devices))
        return table.combine(lp_peaks(table.loads, holders, devices))
    if table.near is None:
        loads = np.einsum("re,ped->rpd", table.loads, holds / holds.sum(axis=2, keepdims=True))
    else:
        every = np.tile(np.arange(experts), count)
        parts = served(table.near, every, holds.reshape(-1, devices))
        loads = parts.reshape(len(parts), count, experts, devices).sum(axis=2)
    return table.combine(loads.max(axis=2))


def _costs(work: Work, index: int, holds: Holds) -> Floats:
    """[placements]."""
    problem = work.problem
    if problem.objective == "load":
        return np.zeros(len(holds))
    if not problem.linked:
        fan_out = home_rows(problem, index, work.layers[index].experts)
        return np.asarray(cover(holds, fan_out.ids).sum(axis=2) @ fan_out.weight)
    rows = link_rows(problem, index, work.layers[index].experts)
    used = cover(holds, rows.ids)
    by_node = used.reshape(*used.shape[:2], -1, problem.devices_per_node).any(axis=3)
    prices = rows.prices
    device, node = prices.device[rows.home, :-1], prices.node[rows.home, :-1]
    of_row = np.einsum("psd,sd->ps", used, device) + np.einsum("psn,sn->ps", by_node, node)
    return np.asarray(prices.scale * (of_row @ rows.weight))


def _beaten_by_none(imbalance: Floats, cost: Floats, which: Ints) -> Front:
    order = np.lexsort((cost, imbalance))
    ordered = cost[order]
    least = np.append(np.inf, np.minimum.accumulate(ordered)[:-1])
    kept = order[ordered < least]
    return Front(imbalance=imbalance[kept], cost=cost[kept], which=which[kept])


def _joined(front: Front, own: Front) -> Front:
    a, b = (index.ravel() for index in np.indices((len(front.cost), len(own.cost))))
    which = np.concatenate([front.which[a], own.which[b]], axis=1)
    return _beaten_by_none(front.imbalance[a] + own.imbalance[b], front.cost[a] + own.cost[b], which)


def _take_cheapest(work: Work, index: int, holds: Holds, front: Front) -> None:
    layer = work.layers[index]
    best = int(np.flatnonzero(front.cost <= front.cost.min() + TOLERANCE)[0])
    now = layer.imbalance if work.problem.objective == "load" else home_cost(work, index)
    work.exact_layers += 1
    work.bounds[index] = min(float(front.cost.min()), now)
    if (front.cost[best], front.imbalance[best]) < (now, layer.imbalance):
        layer.experts, layer.device_of = units_of(holds[front.which[best, 0]])


def _take_within(work: Work, holds: Holds, front: Front) -> None:
    """The cheapest placement of all layers whose mean imbalance is within the cap."""
    problem, layers = work.problem, len(work.layers)
    assert problem.max_imbalance is not None, "without a cap layers do not depend on one another"
    work.exact_layers += layers
    inside = np.flatnonzero(front.imbalance <= problem.max_imbalance * layers + TOLERANCE)
    if not len(inside):
        work.proven_infeasible = True
        return
    best = inside[front.cost[inside].argmin()]
    work.proven = float(front.cost[best]) / layers
    for layer, which in zip(work.layers, front.which[best], strict=True):
        layer.experts, layer.device_of = units_of(holds[which])
