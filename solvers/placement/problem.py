"""What an expert placement is asked for: workloads, slots, execution model, objective and balance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.routing import Routing

Execution = Literal["home", "migrate"]
Objective = Literal["traffic", "load"]
Balance = Literal["workload", "pooled"]


@dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """Put every expert of every layer into a slot of a device.

    Slot p of a layer lives on device p // slots_per_device; devices_per_node consecutive devices form a node.
    Every expert has at least one slot, every slot holds an expert, two replicas never share a device.

    execution `home`: a token's home rank is independent of its routing, so its cost in a layer is the number of
    distinct devices that its top-k experts are fetched from; of an expert's replicas it uses those that a greedy
    cover picks: the device with the most experts still to be reached, ties to the lowest device.
    execution `migrate`: a token lands on the device that holds most of its top-k experts (any replica counts),
    ties to the lowest device; its cost is the number of landing changes between consecutive layers.

    objective `traffic` minimises that cost, per token and layer (`home`) or per token and layer transition
    (`migrate`), weighted over workloads; between equal placements of `home` fewer distinct nodes win.
    objective `load` minimises the imbalance: max device load / mean device load, mean over layers, where an
    expert's load is split evenly over its replicas. balance `workload` is the weighted mean of the workloads'
    own imbalances, `pooled` the imbalance of their weighted mixture. A workload's share is its weight, whatever
    the length of its trace. max_imbalance caps that mean over layers; None: no cap.

    time_limit_s: wall-clock seconds for all layers together. Raises InputError for what cannot be placed.
    """

    workloads: tuple[Routing, ...]
    devices: int
    devices_per_node: int
    slots_per_device: int
    execution: Execution = "home"
    objective: Objective = "traffic"
    balance: Balance = "workload"
    max_imbalance: float | None = None
    time_limit_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_workloads(self.workloads)
        _check_slots(self)

    @property
    def layers(self) -> int:
        return self.workloads[0].layers

    @property
    def num_experts(self) -> int:
        return self.workloads[0].num_experts

    @property
    def top_k(self) -> int:
        return self.workloads[0].top_k

    @property
    def slots(self) -> int:
        """Slots of one layer on all devices."""
        return self.devices * self.slots_per_device

    @property
    def shares(self) -> NDArray[np.float64]:
        """The workloads' weights, summing to 1: [workloads]."""
        weights = np.array([w.weight for w in self.workloads], np.float64)
        return np.asarray(weights / weights.sum(), np.float64)


def _check_choices(problem: PlacementProblem) -> None:
    allowed = {
        "execution": ("home", "migrate"),
        "objective": ("traffic", "load"),
        "balance": ("workload", "pooled"),
    }
    for field, names in allowed.items():
        if getattr(problem, field) not in names:
            raise InputError(
                f"{field} {getattr(problem, field)!r} is unknown",
                where="placement",
                hint=f"{field} must be {' or '.join(names)}",
            )
    cap = problem.max_imbalance
    if cap is not None and not (math.isfinite(cap) and cap >= 1):
        raise InputError(
            f"max_imbalance {cap} is impossible: the largest device load is never below the mean",
            where="placement",
            hint="max_imbalance must be at least 1, or left out for no cap",
        )
    if not (math.isfinite(problem.time_limit_s) and problem.time_limit_s > 0):
        raise InputError(
            f"time_limit_s {problem.time_limit_s} is not a positive number of seconds",
            where="placement",
            hint="give the seconds that solving may take, such as 30",
        )
    if problem.seed < 0:
        raise InputError(f"seed {problem.seed} is negative", where="placement", hint="use 0 or more")


def _check_workloads(workloads: tuple[Routing, ...]) -> None:
    if not workloads:
        raise InputError("there are no workloads", where="placement", hint="give at least one routing trace")
    first = workloads[0]
    names = [routing.name for routing in workloads]
    if len(set(names)) < len(names):
        raise InputError(
            f"two workloads are named {max(names, key=names.count)!r}",
            where="placement",
            hint="give every workload its own name",
        )
    for routing in workloads:
        where = f"workload {routing.name!r}"
        ids = routing.topk_ids
        if ids.ndim != 3 or 0 in ids.shape:
            raise InputError(
                f"the trace is empty (topk_ids has shape {list(ids.shape)})",
                where=where,
                hint="topk_ids must be [tokens, layers, top_k] with at least one of each",
            )
        for field in ("layers", "num_experts", "top_k"):
            if getattr(routing, field) != getattr(first, field):
                raise InputError(
                    f"{field} is {getattr(routing, field)}, but {getattr(first, field)} in {first.name!r}",
                    where=where,
                    hint="all workloads must be traces of one model",
                )
        if not (math.isfinite(routing.weight) and routing.weight > 0):
            raise InputError(
                f"weight {routing.weight} is not a positive number",
                where=where,
                hint="use 1.0 for equal shares",
            )
        _check_ids(ids, routing.num_experts, where)


def _check_ids(ids: NDArray[np.int16], num_experts: int, where: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_experts:
        raise InputError(
            f"expert id {low if low < 0 else high} is outside [0, {num_experts})",
            where=where,
            hint="num_experts must be the number of routed experts of the traced model",
        )
    ordered = np.sort(ids, axis=2)
    repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
    if repeated.any():
        token, layer = (int(i) for i in np.argwhere(repeated)[0])
        raise InputError(
            f"token {token} chose an expert twice in layer {layer}",
            where=where,
            hint="the top_k experts of a token must be distinct",
        )


def _check_slots(problem: PlacementProblem) -> None:
    experts = problem.num_experts
    for field in ("devices", "devices_per_node", "slots_per_device"):
        if getattr(problem, field) < 1:
            raise InputError(f"{field} is {getattr(problem, field)}", where="placement", hint="use 1 or more")
    if problem.devices % problem.devices_per_node:
        raise InputError(
            f"{problem.devices} devices do not fill nodes of {problem.devices_per_node}",
            where="placement",
            hint="devices must be a multiple of devices_per_node",
        )
    if problem.slots < experts:
        raise InputError(
            f"{problem.devices} devices x {problem.slots_per_device} slots hold {problem.slots} experts,"
            f" but the model has {experts}",
            where="placement",
            hint=f"slots_per_device must be at least {-(-experts // problem.devices)}",
        )
    if problem.slots_per_device > experts:
        raise InputError(
            f"slots_per_device {problem.slots_per_device} is larger than experts {experts}:"
            " a device would hold an expert twice",
            where="placement",
            hint=f"slots_per_device must be at most {experts}",
        )
