"""From operations to kernels: what runs in one launch."""

from __future__ import annotations

from typing import NamedTuple, cast

from moecc.ir.core import Function, Module, Op, Value
from moecc.ir.op_checks import ACTIVATION_ATTRIBUTES
from moecc.ir.ops import (
    AllToAll,
    Combine,
    Dispatch,
    DownCombine,
    Experts,
    FusedRouter,
    Gate,
    GateUp,
    Plan,
    Residual,
    Route,
    SharedExpert,
)
from moecc.ir.rewriter import Replacement, Rule, rewrite, uses
from moecc.ir.types import WeightsType
from moecc.passes.manager import Context


def fuse_router(op: Op, function: Function) -> Replacement | None:
    """Gate and route, where nobody else reads the logits."""
    if not isinstance(op, Route) or not isinstance(gate := op.logits.op, Gate):
        return None
    if len(uses(function, gate.logits)) > 1:
        return None
    operands = {**gate.operands, "correction_bias": op.correction_bias}
    router = FusedRouter(operands, {**op.attributes, "tasks": gate.tasks + op.tasks}, location=op.location)
    return Replacement([router], {op.routing: router.routing})


def fuse_experts(op: Op, function: Function) -> Replacement | None:
    """Dispatch gathered inside the gate-up GEMM, the activation in its epilogue, combine after the down GEMM."""
    if not isinstance(op, Combine) or not isinstance(experts := op.rows.op, Experts):
        return None
    if not isinstance(dispatch := experts.rows.op, Dispatch):
        return None
    if len(uses(function, experts.outputs)) > 1 or len(uses(function, dispatch.rows)) > 1:
        return None
    tasks = {"tasks": dispatch.tasks + experts.tasks + op.tasks}
    plan = Plan({"routing": dispatch.routing}, tasks)
    activation = {name: experts.attributes[name] for name in ACTIVATION_ATTRIBUTES} | tasks
    gate_up = GateUp(
        {
            "x": dispatch.x,
            "plan": plan.plan,
            "gate_up": experts.gate_up,
            "gate_up_bias": experts.gate_up_bias,
        },
        activation,
        location=experts.location,
    )
    down = DownCombine(
        {
            "rows": gate_up.rows,
            "plan": plan.plan,
            "routing": op.routing,
            "down": experts.down,
            "down_bias": experts.down_bias,
        },
        tasks,
    )
    return Replacement([plan, gate_up, down], {op.combined: down.combined})


def sort_in_router(op: Op, function: Function) -> Replacement | None:
    """The router plans the tiles itself where its rows stay on the device."""
    if not isinstance(op, FusedRouter) or op.sort:
        return None
    plans = [user for user in uses(function, op.routing) if isinstance(user, Plan)]
    if not plans:
        return None
    router = FusedRouter(op.operands, {**op.attributes, "sort": True})
    planned = {plan.plan: cast(Value, router.plan) for plan in plans}
    return Replacement([router], {op.routing: router.routing, **planned})


def shared_as_experts(op: Op, function: Function) -> Replacement | None:
    """Shared experts become experts that every token selects, where nothing is against it."""
    if not isinstance(op, SharedExpert):
        return None
    partner = routed_partner(op, function)
    if isinstance(partner, str):
        return None
    router, gate_up, down, residual = partner
    stacked = {
        "gate_up": _stack(function, gate_up.gate_up, op.gate_up),
        "down": _stack(function, down.down, op.down),
    }
    shared = cast(WeightsType, op.gate_up.type).shape[0]
    tasks = {"tasks": gate_up.tasks + op.tasks}
    new_router = FusedRouter(
        router.operands, {**router.attributes, "shared": shared}, location=router.location
    )
    plan = cast(Value, new_router.plan)
    new_gate_up = GateUp(
        {"x": gate_up.x, "plan": plan, "gate_up": stacked["gate_up"]},
        gate_up.attributes | tasks,
        location=gate_up.location,
    )
    new_down = DownCombine(
        {"rows": new_gate_up.rows, "plan": plan, "routing": new_router.routing, "down": stacked["down"]},
        tasks,
        location=down.location,
    )
    parts = [new_down.combined if p is down.combined else p for p in residual.parts if p is not op.shared]
    total = Residual({"parts": parts}, residual.attributes, location=residual.location)
    return Replacement([new_router, new_gate_up, new_down, total], {residual.total: total.total})


class Partner(NamedTuple):
    """The fused routed experts whose sum a shared expert's joins."""

    router: FusedRouter
    gate_up: GateUp
    down: DownCombine
    residual: Residual


def routed_partner(op: SharedExpert, function: Function) -> Partner | str:
    """The routed experts that a shared expert can join, or why it keeps kernels of its own."""
    if op.gate is not None:
        return "each token weights it by a gate, and the router gives an expert of every token weight 1"
    if function.first(AllToAll) is not None:
        return "the routed rows leave for other devices"
    residual = next((user for user in uses(function, op.shared) if isinstance(user, Residual)), None)
    downs = [part.op for part in residual.parts if isinstance(part.op, DownCombine)] if residual else []
    if residual is None or len(downs) != 1 or len(uses(function, op.shared)) > 1:
        return "its sum does not meet that of fused routed experts"
    down, gate_up, router = downs[0], downs[0].rows.op, downs[0].routing.op
    if not isinstance(gate_up, GateUp) or not isinstance(router, FusedRouter) or gate_up.x is not op.x:
        return "the routed experts do not start from its input through a fused router"
    if gate_up.gate_up_bias is not None or down.down_bias is not None:
        return "the routed experts have biases"
    routed, shared = cast(WeightsType, gate_up.gate_up.type), cast(WeightsType, op.gate_up.type)
    if routed.shape[1:] != shared.shape[1:] or routed.dtype != shared.dtype:
        return f"its shape {shared} is not that of the routed experts {routed}"
    if any(op.attributes[name] != gate_up.attributes[name] for name in ACTIVATION_ATTRIBUTES):
        return "its activation is another"
    return Partner(router, gate_up, down, residual)


def _stack(function: Function, routed: Value, shared: Value) -> Value:
    """A new argument with the shared experts' weights behind the routed ones, in place of both."""
    whole, more = cast(WeightsType, routed.type), cast(WeightsType, shared.type)
    stacked = Value(routed.name, WeightsType((whole.shape[0] + more.shape[0], *whole.shape[1:]), whole.dtype))
    function.arguments = [stacked if a is routed else a for a in function.arguments if a is not shared]
    return stacked


RULES = (
    Rule("fuse-router", Route, fuse_router),
    Rule("fuse-experts", Combine, fuse_experts),
    Rule("sort-in-router", FusedRouter, sort_in_router),
)
SHARED_RULES = (Rule("shared-as-experts", SharedExpert, shared_as_experts),)


class Fuse:
    """Contract: gate and route are one router; dispatch, experts and combine are a gate-up GEMM that gathers its
    rows and a down GEMM that combines; the router sorts where the rows stay on the device, else a plan stands
    after the exchange; shared experts are always-selected experts where shapes allow. What stays unfused is
    listed in the function's attribute `unfused` with the reason.

    Pseudo-code: RULES to a fixed point, then SHARED_RULES, then list what is left.
    """

    name = "fuse"

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions:
            rewrite(function, RULES)
            rewrite(function, SHARED_RULES)
            if left := _left_over(function):
                function.attributes["unfused"] = left


def _left_over(function: Function) -> list[str]:
    left = [f"{op.mnemonic}: its logits have other readers" for op in function.every(Gate)]
    left += [f"{op.mnemonic}: its rows have other readers" for op in function.every(Experts)]
    left += [f"{op.mnemonic}: {routed_partner(op, function)}" for op in function.every(SharedExpert)]
    return left
