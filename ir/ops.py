"""Every operation of the IR, in the order in which a layer meets them."""

from __future__ import annotations

from fractions import Fraction
from typing import cast, get_args

from moecc.ir.core import Op, attr, operand, operands, optional, optional_result, result, results
from moecc.ir.semantics import Activation, ActivationKind, GroupScore, Router, Score
from moecc.ir.types import (
    DTYPE_BYTES,
    PlanType,
    RoutingType,
    TensorType,
    TokensType,
    Type,
    WeightsType,
    fixed,
    parse_type,
)


class RouterFields:
    """The attributes of `Router`, for the ops that route."""

    top_k = attr(int, min=1, max=256)
    score = attr(str, default="softmax", one_of=get_args(Score))
    select_first = attr(bool, default=False)
    selection_bias = attr(bool, default=False)
    groups = attr(int, default=1, min=1)
    top_groups = attr(int, default=1, min=1)
    group_score = attr(str, default="max", one_of=get_args(GroupScore))
    normalize = attr(bool, default=False)
    norm_eps = attr(float, default=0.0, min=0)
    norm_min = attr(float, default=0.0, min=0)
    scale = attr(float, default=1.0)


ROUTER_ATTRIBUTES = tuple(name for name in vars(RouterFields) if not name.startswith("_") and name != "top_k")


class ActivationFields:
    """The attributes of `Activation`, for the ops that hold an expert's gate-up GEMM."""

    activation = attr(str, default="silu_glu", one_of=get_args(ActivationKind))
    alpha = attr(float, default=1.702)
    limit = attr(float, default=7.0)


ACTIVATION_ATTRIBUTES = ("activation", "alpha", "limit")


def router_of(op: Op) -> Router:
    """The `Router` that a routing op declares."""
    return Router(**{name: op.attributes[name] for name in ROUTER_ATTRIBUTES})


def activation_of(op: Op) -> Activation:
    """The `Activation` that an experts op declares."""
    kind = cast(ActivationKind, op.attributes["activation"])
    return Activation(kind=kind, alpha=op.attributes["alpha"], limit=op.attributes["limit"])


def _tokens(op: Op, name: str = "x") -> TokensType:
    return cast(TokensType, op.operands[name][0].type)


def _weights(op: Op, name: str, rank: int) -> WeightsType:
    weights = cast(WeightsType, op.operands[name][0].type)
    if len(weights.shape) != rank:
        raise op.fail(f"{name} must have {rank} dimensions, not {weights}")
    return weights


def _routing(op: Op, name: str = "routing") -> RoutingType:
    return cast(RoutingType, op.operands[name][0].type)


def _same(op: Op, what: str, left: object, right: object) -> None:
    if left != right:
        raise op.fail(f"{what} disagree: {left} and {right}")


def _vector(op: Op, name: str, size: int) -> None:
    if name in op.operands:
        _same(op, f"sizes of {name}", _weights(op, name, 1).shape[0], size)


def _check_router(op: Op, experts: int) -> None:
    top_k, groups, top_groups = (op.attributes[name] for name in ("top_k", "groups", "top_groups"))
    if top_k > experts:
        raise op.fail(f"top_k {top_k} is larger than experts {experts}", f"top_k must be in [1, {experts}]")
    if experts % groups or top_groups > groups:
        raise op.fail(
            f"{experts} experts cannot be limited to {top_groups} of {groups} groups",
            "groups must divide experts, and top_groups must not exceed groups",
        )
    if top_k > experts // groups * top_groups:
        raise op.fail(f"top_k {top_k} is larger than the experts of {top_groups} groups")
    if op.attributes["selection_bias"] != ("correction_bias" in op.operands):
        raise op.fail("selection_bias must be true exactly where a correction_bias is given")
    _vector(op, "correction_bias", experts)


class Attention(Op, mnemonic="attn.opaque"):
    """Attention with its norms, known by its cost alone: the residual stream, and its norm that enters the FFN.

    A token costs `flops_per_token` in projections and `flops_per_context_token` for each token it attends to,
    at most `context` of them.
    """

    x = operand(TokensType)
    stream = result()
    normed = result()
    flops_per_token = attr(float, min=0)
    flops_per_context_token = attr(float, min=0)
    weight_bytes = attr(int, min=0)
    kv_bytes_per_token = attr(int, min=0)
    context = attr(int, min=0)

    def infer(self) -> tuple[Type, Type]:
        return self.x.type, self.x.type


class DenseMlp(Op, mnemonic="dense.mlp"):
    """The gated MLP of a layer without experts."""

    x = operand(TokensType)
    gate_up = operand(WeightsType)
    down = operand(WeightsType)
    dense = result()

    def infer(self) -> tuple[Type]:
        _same(self, "hidden sizes", _tokens(self).hidden, _weights(self, "gate_up", 2).shape[1])
        _same(self, "hidden sizes", _tokens(self).hidden, _weights(self, "down", 2).shape[0])
        return (self.x.type,)


class Gate(Op, mnemonic="moe.gate"):
    """Router logits in float32: x @ weight^T (+ bias)."""

    x = operand(TokensType)
    weight = operand(WeightsType)
    bias = optional(WeightsType)
    logits = result()

    def infer(self) -> tuple[Type]:
        experts, hidden = _weights(self, "weight", 2).shape
        _same(self, "hidden sizes", _tokens(self).hidden, hidden)
        _vector(self, "bias", experts)
        return (TensorType((_tokens(self).rows, fixed(experts)), "float32"),)


class Route(RouterFields, Op, mnemonic="moe.route"):
    """Scores, selects and weights experts: `Router` says how, to the letter."""

    logits = operand(TensorType)
    correction_bias = optional(WeightsType)
    routing = result()

    def infer(self) -> tuple[Type]:
        tokens, experts = cast(TensorType, self.logits.type).shape
        _check_router(self, int(experts.coefficient))
        return (RoutingType(tokens, Fraction(self.top_k), int(experts.coefficient)),)


class Split(Op, mnemonic="tensor.split"):
    """Cuts tokens into equal chunks."""

    x = operand(TokensType)
    parts = results()
    chunks = attr(int, min=2, max=64)

    def infer(self) -> tuple[Type, ...]:
        whole = _tokens(self)
        part = TokensType(whole.rows.times(Fraction(1, self.chunks)), whole.hidden, whole.dtype)
        return (part,) * self.chunks


class AllToAll(Op, mnemonic="comm.all_to_all"):
    """Tokens to the distinct devices of their experts, or partial sums of those devices back home.

    `dispatch` also delivers the routing, in which only the `slots` experts of a device count; `fan_out` and
    `node_fan_out` are the mean numbers of distinct devices and nodes a token reaches.
    """

    x = operand(TokensType)
    routing = operand(RoutingType)
    received = result()
    local_routing = optional_result()
    direction = attr(str, one_of=("dispatch", "combine"))
    devices = attr(int, min=2)
    slots = attr(int, min=1)
    fan_out = attr(float, min=0)
    node_fan_out = attr(float, min=0)

    def infer(self) -> tuple[Type, Type | None]:
        home = _routing(self)
        if self.direction == "combine":
            return TokensType(home.tokens, _tokens(self).hidden, _tokens(self).dtype), None
        _same(self, "token counts", _tokens(self).rows, home.tokens)
        spread = max(Fraction(self.fan_out).limit_denominator(64), Fraction(1))
        rows = home.tokens.times(spread)
        return (
            TokensType(rows, _tokens(self).hidden, _tokens(self).dtype),
            RoutingType(rows, home.top_k / spread, self.slots),
        )


class AllGather(Op, mnemonic="comm.all_gather"):
    """Makes the context coherent for `migrate`: every device learns the new KV entries of all tokens."""

    x = operand(TokensType)
    gathered = result()
    devices = attr(int, min=2)
    bytes_per_token = attr(int, min=0)

    def infer(self) -> tuple[Type]:
        return (self.x.type,)


class Dispatch(Op, mnemonic="moe.dispatch"):
    """One row for every assignment, grouped by expert."""

    x = operand(TokensType)
    routing = operand(RoutingType)
    rows = result()

    def infer(self) -> tuple[Type]:
        _same(self, "token counts", _tokens(self).rows, _routing(self).tokens)
        return (TokensType(_routing(self).assignments, _tokens(self).hidden, _tokens(self).dtype),)


def _check_experts(op: Op, hidden: int, experts: int) -> int:
    count, two_intermediate, gate_hidden = _weights(op, "gate_up", 3).shape
    _same(op, "expert counts", count, experts)
    _same(op, "hidden sizes", hidden, gate_hidden)
    _vector_of_experts(op, "gate_up_bias", (experts, two_intermediate))
    return two_intermediate // 2


def _vector_of_experts(op: Op, name: str, shape: tuple[int, int]) -> None:
    if name in op.operands:
        _same(op, f"shapes of {name}", _weights(op, name, 2).shape, shape)


class Experts(ActivationFields, Op, mnemonic="moe.experts"):
    """Every row through its expert: down(activation(gate_up(row)))."""

    rows = operand(TokensType)
    routing = operand(RoutingType)
    gate_up = operand(WeightsType)
    down = operand(WeightsType)
    gate_up_bias = optional(WeightsType)
    down_bias = optional(WeightsType)
    outputs = result()

    def infer(self) -> tuple[Type]:
        rows, experts = _tokens(self, "rows"), _routing(self).experts
        intermediate = _check_experts(self, rows.hidden, experts)
        _same(self, "shapes of down", _weights(self, "down", 3).shape, (experts, rows.hidden, intermediate))
        _vector_of_experts(self, "down_bias", (experts, rows.hidden))
        return (rows,)


class Combine(Op, mnemonic="moe.combine"):
    """Sum over a token's experts of weight * row, in a fixed order."""

    rows = operand(TokensType)
    routing = operand(RoutingType)
    combined = result()

    def infer(self) -> tuple[Type]:
        rows, routing = _tokens(self, "rows"), _routing(self)
        _same(self, "row counts", rows.rows, routing.assignments)
        return (TokensType(routing.tokens, rows.hidden, rows.dtype),)


class SharedExpert(ActivationFields, Op, mnemonic="moe.shared_expert"):
    """Experts that every token passes, summed: gate_up [count, 2 I, H], down [count, H, I]."""

    x = operand(TokensType)
    gate_up = operand(WeightsType)
    down = operand(WeightsType)
    shared = result()

    def infer(self) -> tuple[Type]:
        count, two_intermediate, hidden = _weights(self, "gate_up", 3).shape
        _same(self, "hidden sizes", _tokens(self).hidden, hidden)
        _same(self, "shapes of down", _weights(self, "down", 3).shape, (count, hidden, two_intermediate // 2))
        return (self.x.type,)


class Residual(Op, mnemonic="moe.residual"):
    """The sum of its parts."""

    parts = operands(TokensType)
    total = result()

    def infer(self) -> tuple[Type]:
        if not self.parts:
            raise self.fail("needs at least one part")
        for part in self.parts:
            _same(self, "types of the parts", part.type, self.parts[0].type)
        return (self.parts[0].type,)


class Concat(Op, mnemonic="tensor.concat"):
    """Puts chunks back together, in order."""

    parts = operands(TokensType)
    whole = result()

    def infer(self) -> tuple[Type]:
        if not self.parts:
            raise self.fail("needs at least one part")
        first = cast(TokensType, self.parts[0].type)
        return (TokensType(first.rows.times(len(self.parts)), first.hidden, first.dtype),)


class FusedRouter(RouterFields, Op, mnemonic="moe.router"):
    """Gate, route and plan as one kernel: one launch up to 1,024 tokens, two beyond.

    `shared` experts are appended to every token's selection with weight 1. Without `sort` (the rows leave for
    other devices) there is no plan.
    """

    x = operand(TokensType)
    weight = operand(WeightsType)
    bias = optional(WeightsType)
    correction_bias = optional(WeightsType)
    routing = result()
    plan = optional_result()
    shared = attr(int, default=0, min=0)
    sort = attr(bool, default=False)

    def infer(self) -> tuple[Type, Type | None]:
        experts, hidden = _weights(self, "weight", 2).shape
        _same(self, "hidden sizes", _tokens(self).hidden, hidden)
        _vector(self, "bias", experts)
        _check_router(self, experts)
        routing = RoutingType(_tokens(self).rows, Fraction(self.top_k + self.shared), experts + self.shared)
        return routing, PlanType(routing.assignments, routing.experts) if self.sort else None


class Plan(Op, mnemonic="moe.plan"):
    """Sorts assignments by expert and maps GEMM tiles to them, for rows that came from other devices."""

    routing = operand(RoutingType)
    plan = result()

    def infer(self) -> tuple[Type]:
        return (PlanType(_routing(self).assignments, _routing(self).experts),)


class GateUp(ActivationFields, Op, mnemonic="moe.gate_up"):
    """Dispatch gathered inside the gate-up GEMM, the activation in its epilogue."""

    x = operand(TokensType)
    plan = operand(PlanType)
    gate_up = operand(WeightsType)
    gate_up_bias = optional(WeightsType)
    rows = result()

    def infer(self) -> tuple[Type]:
        plan = cast(PlanType, self.plan.type)
        intermediate = _check_experts(self, _tokens(self).hidden, plan.experts)
        return (TokensType(plan.rows, intermediate, _tokens(self).dtype),)


class DownCombine(Op, mnemonic="moe.down_combine"):
    """The down GEMM and the weighted sum over a token's experts, deterministic."""

    rows = operand(TokensType)
    plan = operand(PlanType)
    routing = operand(RoutingType)
    down = operand(WeightsType)
    down_bias = optional(WeightsType)
    combined = result()

    def infer(self) -> tuple[Type]:
        rows, routing = _tokens(self, "rows"), _routing(self)
        experts, hidden, intermediate = _weights(self, "down", 3).shape
        _same(self, "intermediate sizes", rows.hidden, intermediate)
        _same(self, "expert counts", experts, routing.experts)
        _vector_of_experts(self, "down_bias", (experts, hidden))
        return (TokensType(routing.tokens, hidden, rows.dtype),)


class Alloc(Op, mnemonic="buffer.alloc"):
    """Device memory for a value of the given type."""

    buffer = result()
    type = attr(str)

    def infer(self) -> tuple[Type]:
        return (parse_type(self.type),)


class Launch(Op, mnemonic="kernel.launch"):
    """One kernel launch: reads values, fills buffers. `suffix` tells the kernel set of the function: its own is ""."""

    reads = operands(TokensType, TensorType, WeightsType, RoutingType, PlanType)
    writes = operands(TokensType, TensorType, RoutingType, PlanType)
    kernel = attr(str)
    suffix = attr(str, default="")

    def infer(self) -> tuple[Type, ...]:
        return ()


OPS: tuple[type[Op], ...] = (
    Attention,
    DenseMlp,
    Gate,
    Route,
    Split,
    AllToAll,
    AllGather,
    Dispatch,
    Experts,
    Combine,
    SharedExpert,
    Residual,
    Concat,
    FusedRouter,
    Plan,
    GateUp,
    DownCombine,
    Alloc,
    Launch,
)
BY_MNEMONIC = {op.mnemonic: op for op in OPS}


def bytes_at(type: Type, tokens: int) -> float:
    """Size of a value in memory when T is `tokens`: ids and weights of a routing are 4 bytes each."""
    if isinstance(type, TokensType):
        return type.rows.at(tokens) * type.hidden * DTYPE_BYTES[type.dtype]
    if isinstance(type, TensorType):
        size = float(DTYPE_BYTES[type.dtype])
        for extent in type.shape:
            size *= extent.at(tokens)
        return size
    if isinstance(type, WeightsType):
        return type.bytes
    if isinstance(type, RoutingType):
        return type.assignments.at(tokens) * 8
    plan = cast(PlanType, type)
    return plan.rows.at(tokens) * 4 + (plan.experts + 1) * 4
