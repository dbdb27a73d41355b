"""One MoE layer as IR, from its gate to the sum of its experts, and what the passes make of it."""

from __future__ import annotations

from dataclasses import asdict, replace

from moecc.codegen.config import LayerShape
from moecc.codegen.layers import kernel_sets
from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.core import Builder, Function, Module, Value
from moecc.ir.parser import parse_module
from moecc.ir.printer import print_module
from moecc.ir.types import TOKENS, TokensType, WeightsType
from moecc.passes.fuse import Fuse
from moecc.passes.lower import Lower
from moecc.passes.manager import Context, Pass, run_passes
from moecc.passes.normalize import Normalize

PASSES: tuple[Pass, ...] = (Normalize(), Fuse())
"""What runs when a layer is compiled; `lower` follows for each power of two of tokens."""
FUSED = (ops.FusedRouter, ops.GateUp, ops.DownCombine)


def fused_text(shape: LayerShape) -> str:
    """The layer of that shape, for any number of tokens, behind PASSES.

    The arguments of its function have the launcher's names. How the experts' matrices are stored is the function's
    attribute `layout`; their types say what they hold. Raises MoeccError where the passes leave other operations
    than FUSED.
    """
    module = Module("block", [_function(shape)])
    run_passes(module, PASSES, Context())
    (function,) = module.functions
    if tuple(map(type, function.ops)) != FUSED:
        left = function.attributes.get("unfused") or [op.mnemonic for op in function.ops]
        raise MoeccError(f"not fused: {'; '.join(left)}", where="moecc::moe_block")
    return print_module(module)


def lowered_shape(text: str, tokens: int) -> LayerShape:
    """What the kernels of a fused layer are specialised for, as `lower` describes it for that many tokens."""
    module = parse_module(text, "moecc::moe_block")
    (function,) = module.functions
    function.attributes["tokens"] = tokens
    run_passes(module, (Lower(),), Context())
    (kernels,) = kernel_sets(module)
    return replace(kernels.shape, **function.attributes["layout"])


def _function(shape: LayerShape) -> Function:
    hidden, dtype = shape.hidden, shape.dtype
    function = Function("layer", [Value("x", TokensType(TOKENS, hidden, dtype))])
    function.attributes["layout"] = {"transposed": shape.transposed, "interleaved": shape.interleaved}
    function.arguments += [Value(name, type) for name, type in _weights(shape).items()]
    values = {value.name: value for value in function.arguments}
    biases = {name: values[name] for name in ("gate_up_bias", "down_bias") if name in values}
    activation = shape.activation
    switches = {"activation": activation.kind, "alpha": activation.alpha, "limit": activation.limit}

    build, x = Builder(function), values["x"]
    logits = build(ops.Gate, x=x, weight=values["gate"], bias=values.get("router_bias"))
    router = asdict(shape.router) | {"top_k": shape.top_k}
    routing = build(ops.Route, router, logits=logits, correction_bias=values.get("correction_bias"))
    rows = build(ops.Dispatch, x=x, routing=routing)
    matrices = {"gate_up": values["gate_up"], "down": values["down"]}
    outputs = build(ops.Experts, switches, rows=rows, routing=routing, **matrices, **biases)
    function.returns = [build(ops.Combine, rows=outputs, routing=routing)]
    return function


def _weights(shape: LayerShape) -> dict[str, WeightsType]:
    experts, hidden, columns = shape.experts, shape.hidden, shape.gate_up_columns
    found = {"gate": WeightsType((experts, hidden), shape.dtype)}
    if shape.has_router_bias:
        found["router_bias"] = WeightsType((experts,), shape.dtype)
    if shape.router.selection_bias:
        found["correction_bias"] = WeightsType((experts,), "float32")
    found["gate_up"] = WeightsType((experts, columns, hidden), shape.dtype)
    found["down"] = WeightsType((experts, hidden, shape.intermediate), shape.dtype)
    if shape.has_expert_bias:
        found["gate_up_bias"] = WeightsType((experts, columns), shape.dtype)
        found["down_bias"] = WeightsType((experts, hidden), shape.dtype)
    return found
