"""Where every expert lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from moecc.errors import InputError
from moecc.ir.core import Module
from moecc.passes.manager import Context
from moecc.passes.routed_path import moe_layers
from moecc.solvers.placement import PlacementProblem, identity, solve
from moecc.solvers.placement.check import Evaluation, evaluate_all
from moecc.solvers.placement.placement import Placement
from moecc.solvers.routing import Routing


class Place:
    """Contract: a module whose cluster has more than one device gets the attribute `placement`: slot -> expert
    of every layer with experts, its certificate, and its quality beside that of the identity placement, both on
    tokens that the solver did not see. The functions are not changed. One device: nothing to place.

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
        halves = [routing.split() for routing in context.workloads]
        problem = _problem(module, tuple(train for train, _ in halves))
        held_out = [score for _, score in halves]
        solution = solve(problem, lambda done, total: context.progress(self.name, done, total))
        before, after = identity(problem), solution.placement
        module.attributes["placement"] = {
            **after.to_json(),
            "layers": layers,
            "certificate": asdict(solution.certificate),
            "report": {
                "before": _quality(evaluate_all(before, held_out, problem.execution)),
                "after": _quality(evaluate_all(after, held_out, problem.execution)),
                "layers": [_layer_quality(i, layers, before, after, held_out) for i in range(len(layers))],
                "assumptions": sorted({w.assumption for w in context.workloads} - {""}),
                "held_out_tokens": {routing.name: len(routing.topk_ids) for routing in held_out},
            },
        }


def _problem(module: Module, workloads: tuple[Routing, ...]) -> PlacementProblem:
    cluster, wanted = module.attributes["cluster"], module.attributes["placement_request"]
    devices = cluster["nodes"] * cluster["devices_per_node"]
    return PlacementProblem(
        workloads=workloads,
        devices=devices,
        devices_per_node=cluster["devices_per_node"],
        slots_per_device=wanted["slots_per_device"] or -(-workloads[0].num_experts // devices),
        execution=module.attributes["serving"]["execution"],
        objective=wanted["objective"],
        balance=wanted["balance"],
        max_imbalance=wanted["max_imbalance"],
        time_limit_s=wanted["time_limit_s"],
        seed=wanted["seed"],
    )


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **asdict(evaluation.mean),
        "pooled_imbalance": evaluation.pooled_imbalance,
        "workloads": {name: asdict(metrics) for name, metrics in evaluation.workloads.items()},
    }


def _layer_quality(
    index: int, layers: Sequence[int], before: Placement, after: Placement, held_out: Sequence[Routing]
) -> dict[str, Any]:
    """Quality of one layer, judged as a model of one layer."""
    routings = [replace(r, topk_ids=r.topk_ids[:, index : index + 1]) for r in held_out]
    quality: dict[str, Any] = {"layer": layers[index]}
    for label, placement in (("before", before), ("after", after)):
        rows: Any = np.asarray(placement.physical_to_logical)[index : index + 1]
        mean = evaluate_all(replace(placement, physical_to_logical=rows), routings, "home").mean
        quality[label] = {"imbalance": mean.imbalance, "fan_out": mean.fan_out}
    return quality
