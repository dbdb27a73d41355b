"""The imbalance of a placement under every balance, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.batches import BATCHES, draw_batches
from moecc.solvers.placement.check_near import lp_loads, near_loads
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.routing import Routing


def imbalance_of(
    placement: Placement, problem: PlacementProblem, workloads: Sequence[Routing] | None = None
) -> float:
    """The imbalance that problem.balance asks for, on the problem's workloads or on others of the same model.

    Max device load / mean device load with loads split evenly over replicas (problem.near: served by the nearest),
    mean over layers: `workload` the weighted mean of the workloads, `pooled` that of their mixture, `worst` the
    layer's worst workload, `cvar` the mean of the worst 1 - cvar_alpha of the layer's batches (drawn anew from these
    workloads by the problem's seed).
    Raises InputError for workloads of another model.
    """
    routings = tuple(workloads if workloads is not None else problem.workloads)
    for routing in routings:
        if (routing.layers, routing.num_experts) != (placement.layers, placement.num_experts):
            raise InputError(
                f"the trace has {routing.layers} layers of {routing.num_experts} experts,"
                f" the placement {placement.layers} of {placement.num_experts}",
                where=f"workload {routing.name!r}",
                hint="judge a placement on traces of its own model",
            )
    total = sum(routing.weight for routing in routings)
    shares = [routing.weight / total for routing in routings]
    if problem.near:
        return _near(placement, problem, routings, shares)
    if problem.balance == "cvar":
        return _cvar(placement, problem, routings, shares)
    if problem.lp:
        return _lp(placement, problem, routings, shares)
    if problem.balance == "pooled":
        mixture = sum(share * routing.loads() for share, routing in zip(shares, routings, strict=True))
        return float(layer_imbalance(placement, np.asarray(mixture)).mean())
    each = np.array([layer_imbalance(placement, routing.loads()) for routing in routings])
    per_layer = each.max(axis=0) if problem.balance == "worst" else np.array(shares) @ each
    return float(per_layer.mean())


def _near(
    placement: Placement, problem: PlacementProblem, routings: Sequence[Routing], shares: Sequence[float]
) -> float:
    """As imbalance_of, every token served by the nearest replica."""
    rows, weights = list(routings), list(shares)
    if problem.balance == "cvar":
        options = {"count": BATCHES, "batch_tokens": problem.batch_tokens, "seed": problem.seed}
        rows = [routing.take(batch) for routing in routings for batch in draw_batches(routing, **options)]
        weights = np.repeat(np.array(shares) / BATCHES, BATCHES).tolist()
    loads = near_loads(placement, rows)
    if problem.balance == "pooled":
        loads = np.tensordot(weights, loads, 1)[None]
    each = loads.max(axis=2) / loads.mean(axis=2)
    if problem.balance == "cvar":
        return float(np.mean([_tail_mean(layer, weights, 1 - problem.cvar_alpha) for layer in each.T]))
    per_layer = each.max(axis=0) if problem.balance in ("worst", "pooled") else np.array(weights) @ each
    return float(per_layer.mean())


def _lp(
    placement: Placement, problem: PlacementProblem, routings: Sequence[Routing], shares: Sequence[float]
) -> float:
    """As imbalance_of, an expert's load split so that the fullest device is emptiest."""
    rows = np.stack([routing.loads() for routing in routings])
    if problem.balance == "pooled":
        rows = np.tensordot(shares, rows, 1)[None]
    loads = lp_loads(placement, rows)
    each = loads.max(axis=2) / loads.mean(axis=2)
    per_layer = each.max(axis=0) if problem.balance in ("worst", "pooled") else np.array(shares) @ each
    return float(per_layer.mean())


def _cvar(
    placement: Placement, problem: PlacementProblem, routings: Sequence[Routing], shares: Sequence[float]
) -> float:
    seen, weights = [], []
    for routing, share in zip(routings, shares, strict=True):
        batches = draw_batches(routing, count=BATCHES, batch_tokens=problem.batch_tokens, seed=problem.seed)
        for batch in batches:
            seen.append(layer_imbalance(placement, routing.take(batch).loads()))
            weights.append(share / BATCHES)
    return float(np.mean([_tail_mean(layer, weights, 1 - problem.cvar_alpha) for layer in np.array(seen).T]))


def _tail_mean(values: NDArray[np.float64], weights: Sequence[float], tail: float) -> float:
    """The mean of the largest values that together weigh `tail`; the last of them counts in part."""
    left, summed = tail, 0.0
    for value, weight in sorted(zip(values.tolist(), weights, strict=True), reverse=True):
        summed += value * min(weight, left)
        left -= min(weight, left)
    return summed / tail


def device_loads(placement: Placement, loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[layers, devices] from expert loads [layers, experts], split evenly over replicas."""
    out = np.empty((placement.layers, placement.devices))
    for layer, (row, load) in enumerate(zip(placement.physical_to_logical, loads, strict=True)):
        copies = np.bincount(row, minlength=len(load))
        out[layer] = (load / copies)[row].reshape(placement.devices, -1).sum(axis=1)
    return out


def layer_imbalance(placement: Placement, loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[layers] from expert loads [layers, experts]."""
    devices = device_loads(placement, loads)
    return np.asarray(devices.max(axis=1) / devices.mean(axis=1))
