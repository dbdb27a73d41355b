"""What a placement costs, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.check_step import step_us
from moecc.solvers.placement.check_traffic import (
    Floats,
    Mask,
    by_tier,
    copies_between,
    hosts,
    reached,
    token_homes,
)
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
    once (copies_between). Times the bytes of a token: traffic. link_cost: the same copies by the links' cost.
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
    """

    workloads: dict[str, Metrics]
    mean: Metrics
    pooled_imbalance: float

    def imbalance(self, balance: Balance) -> float:
        return self.pooled_imbalance if balance == "pooled" else self.mean.imbalance


def evaluate(
    placement: Placement, routing: Routing, execution: Execution, links: Links | None = None
) -> Metrics:
    """Judge one workload. links: None for tiers by node. Raises InputError if the placement is of another model."""
    _require_match(placement, routing, links)
    links = links or Links.by_node(placement.devices, placement.devices_per_node)
    held = [hosts(placement, layer) for layer in range(placement.layers)]
    loads = _device_loads(routing.loads(), held)
    land = np.array([_landing(h, routing.topk_ids[:, i]) for i, h in enumerate(held)])
    node = land // placement.devices_per_node
    moved = execution == "migrate" and len(land) > 1
    homes = list(land) if execution == "migrate" else [token_homes(placement, routing)] * len(held)
    reach, sent = _reach(placement, routing, held, homes)
    return Metrics(
        imbalance=float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
        **reach,
        hops=float((land[1:] != land[:-1]).mean()) if moved else 0.0,
        node_hops=float((node[1:] != node[:-1]).mean()) if moved else 0.0,
        same_device_pairs=_pairs(routing, held),
        copies=by_tier(sent, links),
        link_cost=float((sent * links.cost).sum()),
    )


def _reach(
    placement: Placement, routing: Routing, held: list[Mask], homes: Sequence[NDArray[np.int64] | None]
) -> tuple[dict[str, float], Floats]:
    """The fan-outs of Metrics, and the copies between devices, means over layers."""
    per_node, tokens = placement.devices_per_node, len(routing.topk_ids)
    rows, sent = [], np.zeros((placement.devices, placement.devices))
    for layer, (hosting, home) in enumerate(zip(held, homes, strict=True)):
        used = reached(hosting, routing.topk_ids[:, layer])
        by_node: Mask = np.asarray(used.reshape(tokens, -1, per_node).any(axis=2))
        row = [used.sum() / tokens, by_node.sum() / tokens]
        for mask, at, count in (
            (used, home, placement.devices),
            (by_node, None if home is None else home // per_node, placement.devices // per_node),
        ):
            kept = mask.sum() / count if at is None else mask[np.arange(tokens), at].sum()
            row.append((mask.sum() - kept) / tokens)
        rows.append(row)
        sent += copies_between(used, home, per_node) / placement.layers
    names = ("fan_out", "node_fan_out", "remote_fan_out", "remote_node_fan_out")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True)), sent


def _landing(held: Mask, ids: NDArray[np.int16]) -> NDArray[np.int64]:
    """[tokens]: the device with most of a token's experts, ties to the lowest."""
    return np.asarray(np.argmax(held[ids].sum(axis=1), axis=1))


def _pairs(routing: Routing, held: list[Mask]) -> float:
    shares = []
    for layer in range(1, len(held)):
        together = (held[layer - 1].astype(np.int64) @ held[layer].T.astype(np.int64)) > 0
        before, after = routing.topk_ids[:, layer - 1], routing.topk_ids[:, layer]
        shares.append(together[before[:, :, None], after[:, None, :]].mean())
    return float(np.mean(shares)) if shares else 0.0


def evaluate_all(
    placement: Placement, workloads: Sequence[Routing], execution: Execution, links: Links | None = None
) -> Evaluation:
    """Judge all workloads; a workload counts by its weight, whatever the length of its trace."""
    each = [evaluate(placement, routing, execution, links) for routing in workloads]
    total = sum(routing.weight for routing in workloads)
    shares = [routing.weight / total for routing in workloads]
    mixture = sum(share * routing.loads() for share, routing in zip(shares, workloads, strict=True))
    held = [hosts(placement, layer) for layer in range(placement.layers)]
    pooled = _device_loads(np.asarray(mixture), held)
    return Evaluation(
        workloads={routing.name: metrics for routing, metrics in zip(workloads, each, strict=True)},
        mean=_mean(each, shares),
        pooled_imbalance=float((pooled.max(axis=1) / pooled.mean(axis=1)).mean()),
    )


def _mean(each: Sequence[Metrics], shares: Sequence[float]) -> Metrics:
    numbers = [field.name for field in fields(Metrics) if field.name != "copies"]
    copies = {
        tier: sum(s * m.copies[tier] for s, m in zip(shares, each, strict=True)) for tier in each[0].copies
    }
    means = {name: sum(s * getattr(m, name) for s, m in zip(shares, each, strict=True)) for name in numbers}
    return Metrics(**means, copies=copies)


def objective_of(placement: Placement, problem: PlacementProblem, evaluation: Evaluation) -> float:
    """The figure that the problem minimises, on the problem's workloads; evaluation: of the placement on them."""
    if problem.objective == "load":
        return imbalance_of(placement, problem)
    if problem.objective == "step":
        return step_us(placement, problem)
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


def _device_loads(expert_loads: NDArray[np.float64], hosting: list[Mask]) -> NDArray[np.float64]:
    """[layers, devices] from [layers, experts]."""
    return np.array(
        [(load / held.sum(axis=1)) @ held for load, held in zip(expert_loads, hosting, strict=True)],
        np.float64,
    )
