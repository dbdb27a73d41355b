"""Where every expert lives."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from moecc.errors import InputError
from moecc.hardware.load import load_device
from moecc.hardware.spec import Cluster
from moecc.ir.core import Module
from moecc.ir.ops import Experts, FusedRouter, GateUp, Launch, Route
from moecc.ir.semantics import Activation
from moecc.ir.types import RoutingType, WeightsType
from moecc.passes.manager import Context
from moecc.passes.routed_path import moe_layers
from moecc.passes.settings import Settings, section, settings_of
from moecc.passes.step_cost import step_cost
from moecc.solvers.placement import PlacementProblem
from moecc.solvers.placement.placing import place
from moecc.solvers.placement.problem import Execution
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing


class Place:
    """Contract: a module whose cluster has more than one device gets the attribute `placement`: slot -> expert
    of every layer with experts, its certificate, and a PlacingReport: its quality beside that of the identity
    placement, on tokens that the solver did not see. The functions are not changed. One device: nothing to place.

    Pseudo-code: halve every workload by sequences; solve on the first halves; judge on the second.
    """

    name = "place"

    def run(self, module: Module, context: Context) -> None:
        settings, layers = settings_of(module), moe_layers(module.functions)
        fused = next((f for f in module.functions if f.first(FusedRouter, GateUp, Launch)), None)
        if fused is not None:
            hint = "run 'place' and 'overlap' before 'fuse'"
            raise InputError(f"@{fused.name} is fused already", where=fused.location, hint=hint)
        if settings.devices == 1 or not layers:
            return
        if not context.workloads:
            raise InputError(
                "no workload to place experts for",
                where=f"module @{module.name}",
                hint="give a trace or an assumed routing under 'workloads'",
            )
        for routing in context.workloads:
            _require_same_model(module, routing, len(layers))
        placed = place(
            _problem(module, settings, tuple(context.workloads)),
            layer_names=layers,
            progress=lambda _, done, total: context.progress(self.name, done, total),
        )
        module.attributes["placement"] = {
            **placed.solution.placement.to_json(),
            "layers": layers,
            "certificate": asdict(placed.solution.certificate),
            "report": asdict(placed.report),
        }


def _require_same_model(module: Module, routing: Routing, layers: int) -> None:
    route = next(op for function in module.functions for op in function.every(Route))
    experts = cast(RoutingType, route.routing.type).experts
    for what, have, want in (
        ("layers with experts", routing.layers, layers),
        ("experts", routing.num_experts, experts),
        ("top_k", routing.top_k, route.top_k),
    ):
        if have != want:
            hint = "use a trace of this model"
            raise InputError(
                f"{what}: {have} in the trace, {want} in @{module.name}", where=routing.name, hint=hint
            )


def _problem(module: Module, settings: Settings, workloads: tuple[Routing, ...]) -> PlacementProblem:
    wanted = section(module, "placement_request")
    slots = wanted.get("slots_per_device") or -(-workloads[0].num_experts // settings.devices)
    step = _step_cost(module, workloads[0].top_k, slots) if wanted.get("objective") == "step" else None
    try:
        return PlacementProblem(
            workloads=workloads,
            devices=settings.devices,
            devices_per_node=settings.devices_per_node,
            slots_per_device=slots,
            execution=cast(Execution, settings.execution),
            objective=wanted["objective"],
            balance=wanted["balance"],
            max_imbalance=wanted["max_imbalance"],
            time_limit_s=wanted["time_limit_s"],
            step_cost=step,
            expert_bytes=_expert_bytes(module),
            seed=wanted["seed"],
        )
    except (KeyError, TypeError) as error:
        where, hint = f"module @{module.name}", "see the attributes that an import writes"
        raise InputError(
            f"attribute placement_request is not whole: {error}", where=where, hint=hint
        ) from None


def _expert_bytes(module: Module) -> int:
    """Weights of one expert of the first layer with experts."""
    experts = next(op for function in module.functions for op in function.every(Experts))
    types = (value.type for value in experts.all_operands)
    return sum(type.bytes // type.shape[0] for type in types if isinstance(type, WeightsType))


def _step_cost(module: Module, top_k: int, slots: int) -> StepCost:
    """Of the first layer with experts, in prefill, on the module's cluster."""
    wanted = settings_of(module)
    experts = next(op for function in module.functions for op in function.every(Experts))
    weights = cast(WeightsType, experts.down.type)
    _, hidden, intermediate = weights.shape
    return step_cost(
        Cluster(
            device=load_device(wanted.device), nodes=wanted.nodes, devices_per_node=wanted.devices_per_node
        ),
        hidden=hidden,
        intermediate=intermediate,
        top_k=top_k,
        slots=slots,
        dtype=weights.dtype,
        tokens_per_device=wanted.prefill,
        gated=Activation(kind=experts.attributes["activation"]).gated,
    )
