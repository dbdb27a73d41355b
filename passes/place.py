"""Where every expert lives."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from moecc.errors import InputError
from moecc.hardware.load import load_device
from moecc.hardware.spec import Cluster
from moecc.ir.core import Module
from moecc.ir.ops import Experts
from moecc.ir.types import WeightsType
from moecc.passes.manager import Context
from moecc.passes.routed_path import moe_layers
from moecc.passes.settings import settings_of
from moecc.passes.step_cost import step_cost
from moecc.solvers.placement import PlacementProblem
from moecc.solvers.placement.placing import place
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
        layers = moe_layers(module.functions)
        cluster = module.attributes["cluster"]
        devices = cluster["nodes"] * cluster["devices_per_node"]
        if devices == 1 or not layers:
            return
        if not context.workloads:
            raise InputError(
                "no workload to place experts for",
                where=f"module @{module.name}",
                hint="give a trace or an assumed routing under 'workloads'",
            )
        placed = place(
            _problem(module, tuple(context.workloads)),
            layer_names=layers,
            progress=lambda _, done, total: context.progress(self.name, done, total),
        )
        module.attributes["placement"] = {
            **placed.solution.placement.to_json(),
            "layers": layers,
            "certificate": asdict(placed.solution.certificate),
            "report": asdict(placed.report),
        }


def _problem(module: Module, workloads: tuple[Routing, ...]) -> PlacementProblem:
    cluster, wanted = module.attributes["cluster"], module.attributes["placement_request"]
    devices = cluster["nodes"] * cluster["devices_per_node"]
    slots = wanted["slots_per_device"] or -(-workloads[0].num_experts // devices)
    step = _step_cost(module, workloads[0].top_k, slots) if wanted["objective"] == "step" else None
    return PlacementProblem(
        workloads=workloads,
        devices=devices,
        devices_per_node=cluster["devices_per_node"],
        slots_per_device=slots,
        execution=module.attributes["serving"]["execution"],
        objective=wanted["objective"],
        balance=wanted["balance"],
        max_imbalance=wanted["max_imbalance"],
        time_limit_s=wanted["time_limit_s"],
        step_cost=step,
        seed=wanted["seed"],
    )


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
    )
