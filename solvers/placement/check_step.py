"""The predicted time of a placement's layers, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.check_balance import device_loads
from moecc.solvers.placement.check_reach import reach_of
from moecc.solvers.placement.check_traffic import Arrivals, Floats, arrivals, arrivals_by_node, received
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing


def step_us(
    placement: Placement, problem: PlacementProblem, workloads: Sequence[Routing] | None = None
) -> float:
    """Predicted time of a layer in us, mean over layers, under problem.step_cost and problem.balance.

    fixed_us + the largest, over devices, of rows * compute_us_per_row + bytes received * us per byte, tokens homed
    evenly on all devices. `pooled`: of the mixture of the workloads; `worst`: of the layer's slowest; else their
    weighted mean. workloads: None for the problem's own. Raises InputError if the problem has no step_cost.
    """
    cost = problem.step_cost
    if cost is None:
        raise InputError("there is no cost of a step", where="placement", hint="give step_cost")
    routings = tuple(workloads if workloads is not None else problem.workloads)
    total = sum(routing.weight for routing in routings)
    shares = np.array([routing.weight / total for routing in routings])
    prices = _us_per_byte(cost, problem.links, placement)
    times = np.array([_device_times(placement, routing, cost, prices) for routing in routings])
    if problem.balance == "pooled":
        slowest = np.tensordot(shares, times, 1).max(axis=1)
    elif problem.balance == "worst":
        slowest = times.max(axis=(0, 2))
    else:
        slowest = shares @ times.max(axis=2)
    return cost.fixed_us + float(slowest.mean())


def _us_per_byte(cost: StepCost, links: Links | None, placement: Placement) -> Arrivals:
    """Of a copy that a device receives; links: None for tiers by node, which have prices by tier."""
    per_node, by_tier = placement.devices_per_node, cost.us_per_byte_by_tier
    if by_tier is not None and links is None:
        return arrivals_by_node(by_tier[1], by_tier[2], placement.devices, per_node)
    assert links is not None
    return arrivals(links.cost if by_tier is None else np.array(by_tier)[links.tier], per_node)


def _device_times(placement: Placement, routing: Routing, cost: StepCost, prices: Arrivals) -> Floats:
    """[layers, devices], us."""
    rows = cost.tokens * routing.top_k * device_loads(placement, routing.loads())
    received_us = [
        received(reach_of(placement, layer, routing.topk_ids[:, layer]), prices, placement.devices_per_node)
        for layer in range(placement.layers)
    ]
    return rows * cost.compute_us_per_row + cost.tokens * cost.bytes_per_token * np.array(received_us)
