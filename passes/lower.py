"""From fused operations to buffers and kernel launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

from moecc.errors import InputError
from moecc.ir.core import Function, Module, Op, Value
from moecc.ir.op_checks import ACTIVATION_ATTRIBUTES, ROUTER_ATTRIBUTES, intermediate_of
from moecc.ir.ops import (
    Alloc,
    Combine,
    Dispatch,
    DownCombine,
    Experts,
    FusedRouter,
    Gate,
    GateUp,
    Launch,
    Plan,
    Route,
    SharedExpert,
)
from moecc.ir.rewriter import replace_values
from moecc.ir.types import PlanType, RoutingType, TokensType, Type, WeightsType
from moecc.passes.manager import Context

ONE_LAUNCH_TOKENS = 1024  # beyond, scattering the sorted rows is a launch of its own
FUSED_COMBINE_TOKENS = 32  # beyond, combining is a launch of its own


class Lower:
    """Contract: routers, plans, expert GEMMs and shared experts are `kernel.launch` ops that fill buffers. The
    function lists its kernel sets in `kernels`, each with all that codegen needs. Attention, dense MLPs, exchanges
    and sums stay: the serving engine runs them.

    Pseudo-code: for every fused op: allocate its results, launch its kernels, let users read the buffers.
    """

    name = "lower"

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions:
            if "tokens" not in function.attributes:
                raise InputError(
                    f"@{function.name} has no phase",
                    where=function.location,
                    hint="run 'overlap' before 'lower'",
                )
            unfused = function.first(Gate, Route, Dispatch, Experts, Combine)
            if unfused is not None:
                raise unfused.fail("is not fused", "run 'fuse' before 'lower'")
            _lower(function)


@dataclass
class _Lowering:
    """One function on its way down: its size, and the kernel sets met so far by name."""

    name: str
    tokens: int
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def describe(self, suffix: str = "", **facts: Any) -> None:
        """Adds facts to a kernel set; chunks of one function agree on them."""
        name = self.name + suffix
        self.sets.setdefault(name, {"name": name}).update(facts)


def _lower(function: Function) -> None:
    lowering = _Lowering(function.name, function.attributes["tokens"])
    lowered: list[Op] = []
    for op in list(function.ops):
        lower = _LOWER.get(type(op))
        if lower is None:
            lowered.append(op)
            continue
        allocs = {value: _alloc(value.type, value.name, op) for value in op.all_results}
        lowered += [*allocs.values(), *lower(op, [a.buffer for a in allocs.values()], lowering)]
        replace_values(function, {old: alloc.buffer for old, alloc in allocs.items()})
    function.ops = lowered
    if lowering.sets:
        function.attributes["kernels"] = list(lowering.sets.values())


def _alloc(type: Type, name: str, op: Op) -> Alloc:
    return Alloc({}, {"type": str(type)}, names=[name], location=op.location)


def _launch(op: Op, kernel: str, reads: Sequence[Value], writes: Sequence[Value], suffix: str = "") -> Launch:
    return Launch(
        {"reads": reads, "writes": writes},
        {"kernel": kernel, "suffix": suffix, "tasks": op.tasks},
        location=op.location,
    )


def _router(op: Any, writes: list[Value], lowering: _Lowering) -> list[Op]:
    routing = cast(RoutingType, op.routing.type)
    tokens = math.ceil(routing.tokens.at(lowering.tokens))
    lowering.describe(
        entry="forward" if op.sort else "distributed",
        tokens=tokens,
        hidden=cast(TokensType, op.x.type).hidden,
        dtype=cast(TokensType, op.x.type).dtype,
        experts=routing.experts - op.shared,
        top_k=op.top_k,
        shared=op.shared,
        router={key: op.attributes[key] for key in ROUTER_ATTRIBUTES},
        has_router_bias=op.bias is not None,
    )
    launch = _launch(op, "router", op.all_operands, writes)
    return _sorting(op, launch, writes[:1], tokens) if op.sort else [launch]


def _sorting(op: Op, launch: Launch, routing: Sequence[Value], tokens: float) -> list[Op]:
    """The launch that sorts into the last of its buffers; for many tokens a second one scatters."""
    if tokens <= ONE_LAUNCH_TOKENS:
        return [launch]
    return [launch, _launch(op, "scatter", routing, launch.writes[-1:], launch.suffix)]


def _combining(
    op: Op,
    reads: Sequence[Value],
    routing: Sequence[Value],
    partial: TokensType,
    out: Sequence[Value],
    tokens: float,
    suffix: str = "",
) -> list[Op]:
    """The down GEMM that combines, or for many tokens the GEMM and then the sum of its `partial` rows."""
    if tokens <= FUSED_COMBINE_TOKENS:
        return [_launch(op, "down_combine", reads, out, suffix)]
    rows = _alloc(partial, "partial", op)
    return [
        rows,
        _launch(op, "down", reads, [rows.buffer], suffix),
        _launch(op, "combine", [rows.buffer, *routing], out, suffix),
    ]


def _plan(op: Any, writes: list[Value], lowering: _Lowering) -> list[Op]:
    routing = cast(RoutingType, op.routing.type)
    received = routing.tokens.at(lowering.tokens)
    lowering.describe(slots=routing.experts, received=math.ceil(received))
    return _sorting(op, _launch(op, "plan", [op.routing], writes), [op.routing], received)


def _gate_up(op: Any, writes: list[Value], lowering: _Lowering) -> list[Op]:
    lowering.describe(
        intermediate=cast(TokensType, op.rows.type).hidden,
        has_expert_bias=op.gate_up_bias is not None,
        activation={key: op.attributes[key] for key in ACTIVATION_ATTRIBUTES},
    )
    return [_launch(op, "gate_up", op.all_operands, writes)]


def _down(op: Any, writes: list[Value], lowering: _Lowering) -> list[Op]:
    plan, down = cast(PlanType, op.plan.type), cast(WeightsType, op.down.type)
    partial = TokensType(plan.rows, down.shape[1], cast(TokensType, op.rows.type).dtype)
    tokens = cast(RoutingType, op.routing.type).tokens.at(lowering.tokens)
    return _combining(op, op.all_operands, [op.routing], partial, writes, tokens)


def _shared(op: Any, writes: list[Value], lowering: _Lowering) -> list[Op]:
    """Shared experts that stay apart: the experts' kernels with a routing that never changes, all of them for every
    token with weight 1, which the host fills once. Behind a gate it is a layer of one expert with a sigmoid router."""
    x, weights = cast(TokensType, op.x.type), cast(WeightsType, op.gate_up.type)
    count, intermediate = weights.shape[0], intermediate_of(op, weights.shape[1])
    lowering.describe(
        "_shared",
        entry="experts" if op.gate is None else "forward",
        tokens=math.ceil(x.rows.at(lowering.tokens)),
        hidden=x.hidden,
        dtype=x.dtype,
        experts=count,
        top_k=count,
        intermediate=intermediate,
        activation={key: op.attributes[key] for key in ACTIVATION_ATTRIBUTES},
        router={"score": "softmax" if op.gate is None else "sigmoid"},
    )
    rows, tokens = x.rows.times(count), x.rows.at(lowering.tokens)
    everyone = _alloc(RoutingType(x.rows, Fraction(count), count), "everyone", op)
    plan = _alloc(PlanType(rows, count), "plan", op)
    hidden = _alloc(TokensType(rows, intermediate, x.dtype), "rows", op)
    partial = TokensType(rows, x.hidden, x.dtype)
    routing = [everyone.buffer]
    down_reads = [hidden.buffer, plan.buffer, *routing, op.down]
    if op.gate is None:
        sort = _launch(op, "plan", routing, [plan.buffer], "_shared")
    else:
        sort = _launch(op, "router", [op.x, op.gate], [*routing, plan.buffer], "_shared")
    return [
        everyone,
        plan,
        hidden,
        *_sorting(op, sort, routing, tokens),
        _launch(op, "gate_up", [op.x, plan.buffer, op.gate_up], [hidden.buffer], "_shared"),
        *_combining(op, down_reads, routing, partial, writes, tokens, "_shared"),
    ]


_LOWER: Mapping[type[Op], Callable[[Any, list[Value], _Lowering], list[Op]]] = {
    FusedRouter: _router,
    Plan: _plan,
    GateUp: _gate_up,
    DownCombine: _down,
    SharedExpert: _shared,
}
