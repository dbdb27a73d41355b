"""What an expert placement is asked for: workloads, slots, execution model, objective and balance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing

Execution = Literal["home", "migrate"]
Objective = Literal["traffic", "load", "step"]
Balance = Literal["workload", "pooled", "worst", "cvar"]
Dispatch = Literal["even", "nearest", "random", "lp"]
LP_DEVICES = 10
"""The search looks at every set of devices for the LP's peak: 1024 of them here."""


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
    (`migrate`), weighted over workloads. Under `home`, where links differ (`linked`: nodes of several devices, tokens
    with homes, or `links` given), it minimises the cost of the links that a token's copies cross instead
    (check.Metrics.link_cost). Without max_imbalance balance decides between equal placements.
    objective `load` minimises the imbalance: max device load / mean device load, mean over layers, where an
    expert's load is split evenly over its replicas. objective `step` minimises the predicted time of a layer, mean
    over layers: step_cost.fixed_us + the largest, over devices, of the time for its rows and for the bytes it
    receives over `links` (None: tiers by node), with tokens homed evenly on all devices; `home` only.

    balance `workload` is the weighted mean of the workloads' own imbalances, `pooled` the imbalance of their
    weighted mixture, `worst` that of the layer's worst workload (weights do not count), `cvar` the mean imbalance of
    the worst 1 - cvar_alpha share of batches: batch_tokens tokens of one workload, from distinct sequences as far as
    there are (batches.draw_batches, seeded with `seed`). A workload's share is its weight, whatever the length of its
    trace. max_imbalance caps that mean over layers; None: no cap.

    dispatch: the engine's rule for which replica serves a token (dispatch.fractions). Loads are those that it makes:
    `even` splits an expert's alike over its replicas, which is also the mean of `random`; `nearest` under `home` gives
    each replica the tokens that it is near to (`near`). `lp` makes the fullest device emptiest; on more than LP_DEVICES
    devices, under `cvar` and `step` it is judged only: the search balances the even split, which it never exceeds.
    in_force: the placement that is to be left, perhaps on fewer or more devices: device d stays device d, devices
    come and go at the end. max_moved_bytes caps the expert weights (expert_bytes each) that devices receive, all
    layers together; None: the moves are few, but not capped.

    time_limit_s: wall-clock seconds for all layers together. workers: processes that share the layers where they
    are independent (`home`); the answer is the same for any number unless the clock ended the search.
    Raises InputError for what cannot be placed.
    """

    workloads: tuple[Routing, ...]
    devices: int
    devices_per_node: int
    slots_per_device: int
    execution: Execution = "home"
    objective: Objective = "traffic"
    balance: Balance = "workload"
    max_imbalance: float | None = None
    cvar_alpha: float = 0.9
    batch_tokens: int = 1024
    in_force: Placement | None = None
    max_moved_bytes: float | None = None
    expert_bytes: int = 0
    time_limit_s: float = 30.0
    seed: int = 0
    workers: int = 1
    dispatch: Dispatch = "even"
    links: Links | None = None
    step_cost: StepCost | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_workloads(self.workloads)
        _check_slots(self)
        _check_homes(self)
        _check_in_force(self)
        _check_step(self)

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
    def max_moves(self) -> int | None:
        """Experts that may move, all layers together; None: as many as it takes."""
        if self.max_moved_bytes is None:
            return None
        return math.floor(self.max_moved_bytes / self.expert_bytes + 1e-9)

    @property
    def homed(self) -> bool:
        """Whether any tokens have a home."""
        return any(routing.homes is not None for routing in self.workloads)

    @property
    def linked(self) -> bool:
        """Whether traffic is the cost of links and not the number of devices, as some may be nearer than others."""
        tiered = 1 < self.devices_per_node < self.devices
        return self.execution == "home" and (self.links is not None or self.homed or tiered)

    @property
    def near(self) -> bool:
        """Whether the load of a replica depends on where it and the tokens are."""
        replicas = self.dispatch == "nearest" and self.execution == "home" and self.slots > self.num_experts
        return replicas and (self.homed or self.devices_per_node < self.devices)

    @property
    def lp(self) -> bool:
        """Whether loads are what an LP makes of them."""
        few = self.devices <= LP_DEVICES and self.balance != "cvar" and self.objective != "step"
        return self.dispatch == "lp" and few and self.slots > self.num_experts

    @property
    def shares(self) -> NDArray[np.float64]:
        """The workloads' weights, summing to 1: [workloads]."""
        weights = np.array([w.weight for w in self.workloads], np.float64)
        return np.asarray(weights / weights.sum(), np.float64)


def _check_choices(problem: PlacementProblem) -> None:
    allowed = {
        "execution": ("home", "migrate"),
        "objective": ("traffic", "load", "step"),
        "dispatch": ("even", "nearest", "random", "lp"),
        "balance": ("workload", "pooled", "worst", "cvar"),
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
    if not 0 <= problem.cvar_alpha < 1:
        raise InputError(
            f"cvar_alpha {problem.cvar_alpha} is outside [0, 1)",
            where="placement",
            hint="0.9 means the worst tenth of the batches",
        )
    for field in ("batch_tokens", "workers"):
        if getattr(problem, field) < 1:
            raise InputError(f"{field} is {getattr(problem, field)}", where="placement", hint="use 1 or more")


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


def _check_homes(problem: PlacementProblem) -> None:
    for routing in problem.workloads:
        homes = routing.homes
        if homes is None:
            continue
        if homes.shape != (len(routing.topk_ids),) or homes.min() < 0 or homes.max() >= problem.devices:
            raise InputError(
                f"homes are not {len(routing.topk_ids)} device numbers below {problem.devices}",
                where=f"workload {routing.name!r}",
                hint="give one home device for each token, from 0",
            )


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


def _check_step(problem: PlacementProblem) -> None:
    if problem.links is not None and problem.links.devices != problem.devices:
        raise InputError(
            f"links join {problem.links.devices} devices, the cluster has {problem.devices}",
            where="placement",
            hint="measure or describe the links of the devices that are placed on",
        )
    if problem.objective != "step":
        return
    if problem.step_cost is None:
        raise InputError(
            "objective 'step' has no cost of a step",
            where="placement",
            hint="give step_cost, such as from the hardware model",
        )
    for field, value, allowed in (
        ("execution", problem.execution, ("home",)),
        ("balance", problem.balance, ("workload", "pooled", "worst")),
    ):
        if value not in allowed:
            raise InputError(
                f"objective 'step' has no {field} {value!r}",
                where="placement",
                hint=f"{field} must be {' or '.join(allowed)}",
            )
    tiers = 3 if problem.links is None else len(problem.links.tiers)
    by_tier = problem.step_cost.us_per_byte_by_tier
    if (by_tier is None and problem.links is None) or (by_tier is not None and len(by_tier) != tiers):
        raise InputError(
            f"us_per_byte_by_tier prices {0 if by_tier is None else len(by_tier)} tiers of {tiers}",
            where="step cost",
            hint="give one price per tier, the device itself first, or links in us per byte and None here",
        )


def _check_in_force(problem: PlacementProblem) -> None:
    held, budget = problem.in_force, problem.max_moved_bytes
    if problem.expert_bytes < 0:
        raise InputError(
            f"expert_bytes {problem.expert_bytes} is negative",
            where="placement",
            hint="give the bytes of one expert's weights",
        )
    if held is None:
        if budget is not None:
            raise InputError(
                "max_moved_bytes without a placement in force",
                where="placement",
                hint="give the placement to start from as in_force",
            )
        return
    for field in ("layers", "num_experts"):
        if getattr(held, field) != getattr(problem, field):
            raise InputError(
                f"the placement in force has {field} {getattr(held, field)}, the traces {getattr(problem, field)}",
                where="placement",
                hint="move between placements of one model",
            )
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise InputError(
            f"max_moved_bytes {budget} is not a number of bytes", where="placement", hint="give 0 or more"
        )
    if budget is not None and problem.expert_bytes == 0:
        raise InputError(
            "max_moved_bytes without expert_bytes",
            where="placement",
            hint="give the bytes of one expert's weights as expert_bytes",
        )
