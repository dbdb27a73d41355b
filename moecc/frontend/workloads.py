"""The workloads of a CompileSpec as routings: recorded traces, or assumptions that say so."""

from __future__ import annotations

from dataclasses import replace

from moecc.frontend.spec import CompileSpec, WorkloadSpec, locate
from moecc.frontend.trace import check_trace, load_trace
from moecc.solvers.routing import Routing, assumed_routing


def workloads(spec: CompileSpec) -> tuple[Routing, ...]:
    """One routing for each workload, in order, with its weight; assumed ones are drawn from placement.seed.

    Errors: InputError for a malformed trace (at the trace) or one of another model (at its line in model.yaml).
    """
    return tuple(_routing(spec, index, workload) for index, workload in enumerate(spec.workloads))


def _routing(spec: CompileSpec, index: int, workload: WorkloadSpec) -> Routing:
    if workload.trace is not None:
        trace = workload.trace
        routing = trace if isinstance(trace, Routing) else load_trace(trace, workload.name)
        where = locate(spec.locations, f"workloads.{index}.trace", workload.name)
        check_trace(routing, spec.model, where)
    else:
        routing = assumed_routing(
            workload.routing or "uniform",
            layers=len(spec.model.moe_layers),
            experts=spec.model.experts,
            top_k=spec.model.top_k,
            alpha=workload.alpha,
            seed=spec.placement.seed + index,
        )
    return replace(routing, name=workload.name, weight=workload.weight)
