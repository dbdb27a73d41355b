"""What a placement costs, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import Balance, Execution, PlacementProblem
from moecc.solvers.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One workload under one placement; means over tokens and layers.

    imbalance: max device load / mean device load, mean over layers, loads split evenly over replicas.
    fan_out, node_fan_out: distinct devices and nodes that a token reaches in a layer; with replicas it uses those
    that a greedy cover picks (most experts still to be reached, ties to the lowest device).
    hops, node_hops: share of a token's layer transitions at which its landing device or node changes; it lands
    where most of its experts are, ties to the lowest device. 0 under `home`, where a token returns home.
    same_device_pairs: share of the top_k x top_k expert pairs of adjacent layers that some device holds both of.
    """

    imbalance: float
    fan_out: float
    node_fan_out: float
    hops: float
    node_hops: float
    same_device_pairs: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All workloads: each one's metrics, their weighted mean, and the imbalance of their weighted mixture.

    `mean.imbalance` is the imbalance under balance `workload`, `pooled_imbalance` the one under `pooled`.
    """

    workloads: dict[str, Metrics]
    mean: Metrics
    pooled_imbalance: float

    def imbalance(self, balance: Balance) -> float:
        return self.pooled_imbalance if balance == "pooled" else self.mean.imbalance


def evaluate(placement: Placement, routing: Routing, execution: Execution) -> Metrics:
    """Judge one workload. Raises InputError if the placement is of another model."""
    _require_match(placement, routing)
    hosts = [_hosts(placement, layer) for layer in range(placement.layers)]
    loads = _device_loads(routing.loads(), hosts)
    fan_out, node_fan_out, pairs = [], [], []
    landings: list[NDArray[np.int64]] = []
    for layer, held in enumerate(hosts):
        ids = routing.topk_ids[:, layer]
        reached = _reached(held, ids)
        by_node = reached.reshape(len(ids), -1, placement.devices_per_node).any(axis=2)
        fan_out.append(reached.sum() / len(ids))
        node_fan_out.append(by_node.sum() / len(ids))
        if layer:
            together = (hosts[layer - 1].astype(np.int64) @ held.T.astype(np.int64)) > 0
            pairs.append(together[routing.topk_ids[:, layer - 1, :, None], ids[:, None, :]].mean())
        if execution == "migrate":
            landings.append(np.argmax(held[ids].sum(axis=1), axis=1))
    where = np.array(landings)
    nodes = where // placement.devices_per_node
    moved = len(landings) > 1
    return Metrics(
        imbalance=float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
        fan_out=float(np.mean(fan_out)),
        node_fan_out=float(np.mean(node_fan_out)),
        hops=float((where[1:] != where[:-1]).mean()) if moved else 0.0,
        node_hops=float((nodes[1:] != nodes[:-1]).mean()) if moved else 0.0,
        same_device_pairs=float(np.mean(pairs)) if pairs else 0.0,
    )


def evaluate_all(placement: Placement, workloads: Sequence[Routing], execution: Execution) -> Evaluation:
    """Judge all workloads; a workload counts by its weight, whatever the length of its trace."""
    each = [evaluate(placement, routing, execution) for routing in workloads]
    total = sum(routing.weight for routing in workloads)
    shares = [routing.weight / total for routing in workloads]
    mean = Metrics(
        **{
            field.name: sum(s * getattr(m, field.name) for s, m in zip(shares, each, strict=True))
            for field in fields(Metrics)
        }
    )
    mixture = sum(share * routing.loads() for share, routing in zip(shares, workloads, strict=True))
    hosts = [_hosts(placement, layer) for layer in range(placement.layers)]
    pooled = _device_loads(np.asarray(mixture), hosts)
    return Evaluation(
        workloads={routing.name: metrics for routing, metrics in zip(workloads, each, strict=True)},
        mean=mean,
        pooled_imbalance=float((pooled.max(axis=1) / pooled.mean(axis=1)).mean()),
    )


def objective_of(evaluation: Evaluation, problem: PlacementProblem) -> float:
    """The figure that the problem minimises."""
    if problem.objective == "load":
        return evaluation.imbalance(problem.balance)
    return evaluation.mean.fan_out if problem.execution == "home" else evaluation.mean.hops


def _require_match(placement: Placement, routing: Routing) -> None:
    for what, have, want in (
        ("layers", placement.layers, routing.layers),
        ("experts", placement.num_experts, routing.num_experts),
    ):
        if have != want:
            raise InputError(
                f"the placement has {have} {what}, the trace {want}",
                where=f"workload {routing.name!r}",
                hint="judge a placement on traces of its own model",
            )


def _hosts(placement: Placement, layer: int) -> NDArray[np.bool_]:
    """[experts, devices]: which devices hold the expert."""
    held = np.zeros((placement.num_experts, placement.devices), np.bool_)
    slots = np.arange(placement.slots)
    held[placement.physical_to_logical[layer], slots // placement.slots_per_device] = True
    return held


def _device_loads(expert_loads: NDArray[np.float64], hosts: list[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """[layers, devices] from [layers, experts]."""
    return np.array(
        [(load / held.sum(axis=1)) @ held for load, held in zip(expert_loads, hosts, strict=True)], np.float64
    )


def _reached(held: NDArray[np.bool_], ids: NDArray[np.int16]) -> NDArray[np.bool_]:
    """[tokens, devices]: the devices that a greedy cover of every token's experts uses."""
    options = held[ids]
    if (held.sum(axis=1) == 1).all():
        return np.asarray(options.any(axis=1))
    reached = np.zeros((len(ids), held.shape[1]), np.bool_)
    open_ = np.ones(ids.shape, np.bool_)
    while open_.any():
        tokens = np.flatnonzero(open_.any(axis=1))
        gains = (options[tokens] & open_[tokens][:, :, None]).sum(axis=1)
        best = np.argmax(gains, axis=1)
        reached[tokens, best] = True
        open_[tokens] &= ~options[tokens, :, best]
    return reached
