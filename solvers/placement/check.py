"""What a placement costs, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.check_balance import imbalance_of, layer_imbalance
from moecc.solvers.placement.check_step import step_us
from moecc.solvers.placement.check_survey import Survey, survey
from moecc.solvers.placement.check_traffic import Tolls
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import Balance, Execution, PlacementProblem
from moecc.solvers.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One workload under one placement; means over tokens and layers.

    imbalance: max device load / mean device load, mean over layers, loads split evenly over replicas.
    fan_out, node_fan_out: distinct devices and nodes that a token reaches in a layer; with replicas it uses those
    that a greedy cover picks (most experts still to be reached, ties to the lowest device).
    remote_fan_out, remote_node_fan_out: those other than the token's home, which under `migrate` is its landing
    device of the layer; a trace without homes is judged by the exact mean over all devices as home.
    hops, node_hops: share of a token's layer transitions at which its landing device or node changes; it lands
    where most of its experts are, ties to the lowest device. 0 under `home`, where a token returns home.
    same_device_pairs: share of the top_k x top_k expert pairs of adjacent layers that some device holds both of.
    copies: of a token per layer over each tier of the links, one way, hops not counted; a token crosses to a node
    once (copies_sent). Times the bytes of a token: traffic. link_cost: the same copies by the links' cost.
    """

    imbalance: float
    fan_out: float
    node_fan_out: float
    remote_fan_out: float
    remote_node_fan_out: float
    hops: float
    node_hops: float
    same_device_pairs: float
    copies: dict[str, float]
    link_cost: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All workloads: each one's metrics, their weighted mean, and the imbalance of their weighted mixture.

    `mean.imbalance` is the imbalance under balance `workload`, `pooled_imbalance` the one under `pooled`.
    layer_imbalance, layer_fan_out: of each layer, the weighted mean of the workloads.
    """

    workloads: dict[str, Metrics]
    mean: Metrics
    pooled_imbalance: float
    layer_imbalance: tuple[float, ...]
    layer_fan_out: tuple[float, ...]

    def imbalance(self, balance: Balance) -> float:
        return self.pooled_imbalance if balance == "pooled" else self.mean.imbalance


def evaluate(
    placement: Placement, routing: Routing, execution: Execution, links: Links | None = None
) -> Metrics:
    """Judge one workload. links: None for tiers by node. Raises InputError if the placement is of another model."""
    return evaluate_all(placement, (routing,), execution, links).mean


def evaluate_all(
    placement: Placement, workloads: Sequence[Routing], execution: Execution, links: Links | None = None
) -> Evaluation:
    """Judge all workloads; a workload counts by its weight, whatever the length of its trace."""
    return evaluate_under(placement, workloads, (execution,), links)[execution]


def evaluate_under(
    placement: Placement,
    workloads: Sequence[Routing],
    executions: Sequence[Execution],
    links: Links | None = None,
) -> dict[Execution, Evaluation]:
    """Judge all workloads under several executions, which costs little more than under one."""
    for routing in workloads:
        _require_match(placement, routing, links)
    tolls = Tolls(links, placement.devices, placement.devices_per_node)
    surveys = [survey(placement, routing, executions, tolls) for routing in workloads]
    total = sum(routing.weight for routing in workloads)
    shares = [routing.weight / total for routing in workloads]
    mixture = sum(share * routing.loads() for share, routing in zip(shares, workloads, strict=True))
    pooled = layer_imbalance(placement, np.asarray(mixture))
    by_layer = [
        np.tensordot(shares, [getattr(s, name) for s in surveys], 1) for name in ("imbalance", "fan_out")
    ]
    found: dict[Execution, Evaluation] = {}
    for execution in executions:
        each = [_metrics(surveyed, execution, tolls) for surveyed in surveys]
        found[execution] = Evaluation(
            workloads={routing.name: metrics for routing, metrics in zip(workloads, each, strict=True)},
            mean=_mean(each, shares),
            pooled_imbalance=float(pooled.mean()),
            layer_imbalance=tuple(by_layer[0].tolist()),
            layer_fan_out=tuple(by_layer[1].tolist()),
        )
    return found


def _metrics(surveyed: Survey, execution: Execution, tolls: Tolls) -> Metrics:
    remote, remote_nodes, *copies, cost = surveyed.sent[execution].mean(axis=0).tolist()
    moved = execution == "migrate"
    return Metrics(
        imbalance=float(surveyed.imbalance.mean()),
        fan_out=float(surveyed.fan_out.mean()),
        node_fan_out=float(surveyed.node_fan_out.mean()),
        remote_fan_out=remote,
        remote_node_fan_out=remote_nodes,
        hops=surveyed.hops if moved else 0.0,
        node_hops=surveyed.node_hops if moved else 0.0,
        same_device_pairs=surveyed.same_device_pairs,
        copies=dict(zip(tolls.tiers, copies, strict=True)),
        link_cost=cost,
    )


def _mean(each: Sequence[Metrics], shares: Sequence[float]) -> Metrics:
    numbers = [field.name for field in fields(Metrics) if field.name != "copies"]
    copies = {
        tier: sum(s * m.copies[tier] for s, m in zip(shares, each, strict=True)) for tier in each[0].copies
    }
    means = {name: sum(s * getattr(m, name) for s, m in zip(shares, each, strict=True)) for name in numbers}
    return Metrics(**means, copies=copies)


def objective_of(placement: Placement, problem: PlacementProblem, evaluation: Evaluation) -> float:
    """The figure that the problem minimises; evaluation: of the placement on the problem's workloads and links."""
    if problem.objective == "load":
        return imbalance_of(placement, problem)
    if problem.objective == "step":
        return step_us(placement, problem)
    if problem.linked:
        return evaluation.mean.link_cost
    return evaluation.mean.fan_out if problem.execution == "home" else evaluation.mean.hops


def moved_experts(old: Placement, new: Placement) -> int:
    """How many experts devices receive that they do not hold yet, all layers together; device d stays device d."""
    moved = 0
    for before, after in zip(old.physical_to_logical.tolist(), new.physical_to_logical.tolist(), strict=True):
        for device in range(new.devices):
            held = set(before[device * old.slots_per_device : (device + 1) * old.slots_per_device])
            wanted = set(after[device * new.slots_per_device : (device + 1) * new.slots_per_device])
            moved += len(wanted - held)
    return moved


def _require_match(placement: Placement, routing: Routing, links: Links | None) -> None:
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
    if links is not None and links.devices != placement.devices:
        raise InputError(
            f"links join {links.devices} devices, the placement has {placement.devices}",
            where="links",
            hint="measure or describe the links of the devices that are placed on",
        )
