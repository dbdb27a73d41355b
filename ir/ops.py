"""Every operation of the IR, in the order in which a layer meets them."""

from __future__ import annotations

from fractions import Fraction
from typing import cast

from moecc.ir.core import Op, attr, operand, operands, optional, optional_result, result, results
from moecc.ir.op_checks import (
    ActivationFields,
    RouterFields,
    check_experts,
    check_router,
    intermediate_of,
    require_expert_bias,
    require_same,
    require_vector,
    routing_of,
    tokens_of,
    weights_of,
)
from moecc.ir.types import (
    PlanType,
    RoutingType,
    TensorType,
    TokensType,
    Type,
    WeightsType,
    fixed,
    parse_type,
)


class Attention(Op, mnemonic="attn.opaque"):
    """Attention, or what a model has in its place, with its norms and known by its cost alone: the residual stream,
    and its norm that enters the FFN.

    A token costs `flops_per_token` in projections and `flops_per_context_token` for each token it attends to,
    at most `context` of them. A state-space mixer keeps `state_bytes` for each sequence instead of a context.
    Without weights there is no mixer, just the norm.
    """

    x = operand(TokensType)
    stream = result()
    normed = result()
    flops_per_token = attr(float, min=0)
    flops_per_context_token = attr(float, min=0)
    weight_bytes = attr(int, min=0)
    kv_bytes_per_token = attr(int, min=0)
    context = attr(int, min=0)
    state_bytes = attr(int, default=0, min=0)

    def infer(self) -> tuple[Type, Type]:
        return self.x.type, self.x.type


class DenseMlp(ActivationFields, Op, mnemonic="dense.mlp"):
    """The MLP of a layer without experts."""

    x = operand(TokensType)
    gate_up = operand(WeightsType)
    down = operand(WeightsType)
    dense = result()

    def infer(self) -> tuple[Type]:
        two_intermediate, hidden = weights_of(self, "gate_up", 2).shape
        require_same(self, "hidden sizes", tokens_of(self).hidden, hidden)
        shape = (hidden, intermediate_of(self, two_intermediate))
        require_same(self, "shapes of down", weights_of(self, "down", 2).shape, shape)
        return (self.x.type,)


class Gate(Op, mnemonic="moe.gate"):
    """Router logits in float32: x @ weight^T (+ bias)."""

    x = operand(TokensType)
    weight = operand(WeightsType)
    bias = optional(WeightsType)
    logits = result()

    def infer(self) -> tuple[Type]:
        experts, hidden = weights_of(self, "weight", 2).shape
        require_same(self, "hidden sizes", tokens_of(self).hidden, hidden)
        require_vector(self, "bias", experts)
        return (TensorType((tokens_of(self).rows, fixed(experts)), "float32"),)


class Route(RouterFields, Op, mnemonic="moe.route"):
    """Scores, selects and weights experts: `Router` says how, to the letter."""

    logits = operand(TensorType)
    correction_bias = optional(WeightsType)
    routing = result()

    def infer(self) -> tuple[Type]:
        tokens, experts = cast(TensorType, self.logits.type).shape
        check_router(self, int(experts.coefficient))
        return (RoutingType(tokens, Fraction(self.top_k), int(experts.coefficient)),)


class Split(Op, mnemonic="tensor.split"):
    """Cuts tokens into equal chunks."""

    x = operand(TokensType)
    parts = results()
    chunks = attr(int, min=2, max=64)

    def infer(self) -> tuple[Type, ...]:
        whole = tokens_of(self)
        part = TokensType(whole.rows.times(Fraction(1, self.chunks)), whole.hidden, whole.dtype)
        return (part,) * self.chunks


class AllToAll(Op, mnemonic="comm.all_to_all"):
    """Tokens to the distinct devices of their experts, or partial sums of those devices back together.

    `dispatch` also delivers the routing, in which only the `slots` experts of a device count. `fan_out` is the mean
    number of distinct devices that a token's experts are on; `remote_devices` and `remote_nodes` are the mean numbers
    of copies of a token that leave its device and its node.
    """

    x = operand(TokensType)
    routing = operand(RoutingType)
    received = result()
    local_routing = optional_result()
    direction = attr(str, one_of=("dispatch", "combine"))
    devices = attr(int, min=2)
    slots = attr(int, min=1)
    fan_out = attr(float, min=0)
    remote_devices = attr(float, min=0)
    remote_nodes = attr(float, min=0)

    def infer(self) -> tuple[Type, Type | None]:
        home = routing_of(self)
        if self.direction == "combine":
            return TokensType(home.tokens, tokens_of(self).hidden, tokens_of(self).dtype), None
        require_same(self, "token counts", tokens_of(self).rows, home.tokens)
        spread = max(Fraction(self.fan_out).limit_denominator(64), Fraction(1))
        rows = home.tokens.times(spread)
        return (
            TokensType(rows, tokens_of(self).hidden, tokens_of(self).dtype),
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
        require_same(self, "token counts", tokens_of(self).rows, routing_of(self).tokens)
        return (TokensType(routing_of(self).assignments, tokens_of(self).hidden, tokens_of(self).dtype),)


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
        rows, experts = tokens_of(self, "rows"), routing_of(self).experts
        intermediate = check_experts(self, rows.hidden, experts)
        require_same(
            self, "shapes of down", weights_of(self, "down", 3).shape, (experts, rows.hidden, intermediate)
        )
        require_expert_bias(self, "down_bias", (experts, rows.hidden))
        return (rows,)


class Combine(Op, mnemonic="moe.combine"):
    """Sum over a token's experts of weight * row, in a fixed order."""

    rows = operand(TokensType)
    routing = operand(RoutingType)
    combined = result()

    def infer(self) -> tuple[Type]:
        rows, routing = tokens_of(self, "rows"), routing_of(self)
        require_same(self, "row counts", rows.rows, routing.assignments)
        return (TokensType(routing.tokens, rows.hidden, rows.dtype),)


class SharedExpert(ActivationFields, Op, mnemonic="moe.shared_expert"):
    """Experts that every token passes, summed: gate_up [count, 2 I, H] ([count, I, H] where the activation has no
    gate), down [count, H, I].

    With `gate` [1, H] there is one, and each token weights it by sigmoid(x @ gate^T).
    """

    x = operand(TokensType)
    gate_up = operand(WeightsType)
    down = operand(WeightsType)
    gate = optional(WeightsType)
    shared = result()

    def infer(self) -> tuple[Type]:
        count, columns, hidden = weights_of(self, "gate_up", 3).shape
        require_same(self, "hidden sizes", tokens_of(self).hidden, hidden)
        shape = (count, hidden, intermediate_of(self, columns))
        require_same(self, "shapes of down", weights_of(self, "down", 3).shape, shape)
        if "gate" in self.operands:
            require_same(self, "shapes of gate", weights_of(self, "gate", 2).shape, (1, hidden))
            require_same(self, "experts behind the gate", count, 1)
        return (self.x.type,)


class Residual(Op, mnemonic="moe.residual"):
    """The sum of its parts."""

    parts = operands(TokensType)
    total = result()

    def infer(self) -> tuple[Type]:
        if not self.parts:
            raise self.fail("needs at least one part")
        for part in self.parts:
            require_same(self, "types of the parts", part.type, self.parts[0].type)
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
        experts, hidden = weights_of(self, "weight", 2).shape
        require_same(self, "hidden sizes", tokens_of(self).hidden, hidden)
        require_vector(self, "bias", experts)
        check_router(self, experts)
        routing = RoutingType(tokens_of(self).rows, Fraction(self.top_k + self.shared), experts + self.shared)
        return routing, PlanType(routing.assignments, routing.experts) if self.sort else None


class Plan(Op, mnemonic="moe.plan"):
    """Sorts assignments by expert and maps GEMM tiles to them, for rows that came from other devices."""

    routing = operand(RoutingType)
    plan = result()

    def infer(self) -> tuple[Type]:
        return (PlanType(routing_of(self).assignments, routing_of(self).experts),)


class GateUp(ActivationFields, Op, mnemonic="moe.gate_up"):
    """Dispatch gathered inside the gate-up GEMM, the activation in its epilogue."""

    x = operand(TokensType)
    plan = operand(PlanType)
    gate_up = operand(WeightsType)
    gate_up_bias = optional(WeightsType)
    rows = result()

    def infer(self) -> tuple[Type]:
        plan = cast(PlanType, self.plan.type)
        intermediate = check_experts(self, tokens_of(self).hidden, plan.experts)
        return (TokensType(plan.rows, intermediate, tokens_of(self).dtype),)


class DownCombine(Op, mnemonic="moe.down_combine"):
    """The down GEMM and the weighted sum over a token's experts, deterministic."""

    rows = operand(TokensType)
    plan = operand(PlanType)
    routing = operand(RoutingType)
    down = operand(WeightsType)
    down_bias = optional(WeightsType)
    combined = result()

    def infer(self) -> tuple[Type]:
        rows, routing = tokens_of(self, "rows"), routing_of(self)
        experts, hidden, intermediate = weights_of(self, "down", 3).shape
        require_same(self, "intermediate sizes", rows.hidden, intermediate)
        require_same(self, "expert counts", experts, routing.experts)
        require_expert_bias(self, "down_bias", (experts, hidden))
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
