"""Lifts a whole layer out of a graph: where the router of recognised experts is one that the IR knows, gate, route,
experts and combine become IR, and what the passes make of it decides which kernels run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from moecc.codegen.config import DType, LayerShape
from moecc.errors import MoeccError
from moecc.integrations.block_ir import fused_text
from moecc.integrations.block_op import block_launcher
from moecc.integrations.dynamo.boundary import closed_region
from moecc.integrations.dynamo.experts import ExpertsBlock
from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    argument,
    is_cast,
    node_argument,
    operation,
    region,
    require,
    same_sizes,
    storages,
    tensor,
    value,
    written,
)
from moecc.integrations.dynamo.router import Routed, recognise_router
from moecc.integrations.launchers import token_bucket
from moecc.ir.semantics import Router

MANY_TOKENS = 1 << 20
VIEWS = ("view", "reshape", "flatten", "contiguous")


@dataclass(frozen=True, kw_only=True)
class LiftedBlock:
    """A layer by the arguments of `moecc::moe_block`, and the nodes that the op stands for.

    launches: how many kernels a call runs; two numbers where few tokens and very many differ in it.
    """

    experts: ExpertsBlock
    gate: fx.Node
    router_bias: fx.Node | None
    correction_bias: fx.Node | None
    router: Router
    ir: str
    launches: tuple[int, ...]
    inside: list[fx.Node]


def lift(experts: ExpertsBlock, *, autocast: bool) -> LiftedBlock:
    """The layer around its experts. Raises UnmatchedError with the reason why the router stays in the graph."""
    require(not tensor(experts.output).requires_grad, "gradients are wanted")
    require(not autocast, "autocast decides in which type its logits are computed")
    dtype = tensor(experts.gate_up).dtype
    require(tensor(experts.x).dtype == dtype, f"{experts.x.name} is no {dtype}, as the experts are")
    views = _views(experts.x)
    product = _gate(experts, views[-1])
    gate, router_bias = _gate_weights(product, experts)
    routed = Routed(
        logits=product,
        topk_ids=experts.topk_ids,
        topk_weights=experts.topk_weights,
        hidden=tuple(dict.fromkeys((*views, *_views(node_argument(product, 0, "input"))))),
        until=experts.output,
    )
    _require_exact(routed)
    router, correction_bias = recognise_router(routed, tensor(gate).shape[0])
    optional = [bias for bias in (router_bias, correction_bias) if bias is not None]
    inputs = [*routed.hidden, gate, *optional, *experts.matrices]
    inside = closed_region(inputs, experts.output, hidden=routed.hidden)
    ir = _compiled(experts, router, has_router_bias=router_bias is not None)
    return LiftedBlock(
        experts=experts,
        gate=gate,
        router_bias=router_bias,
        correction_bias=correction_bias,
        router=router,
        ir=ir,
        launches=_launches(ir, tensor(experts.x)),
        inside=inside,
    )


def _views(node: fx.Node) -> list[fx.Node]:
    """A value and what it comes from, through views of the same rows and casts that lose nothing; the source last."""
    found = [node]
    while node.args and isinstance(before := node.args[0], fx.Node):
        is_view = operation(node) in VIEWS and _same_rows(before, node)
        if not is_view and not (is_cast(node) and _is_lossless(before, node)):
            break
        node = before
        found.append(node)
    return found


def _same_rows(before: fx.Node, after: fx.Node) -> bool:
    left, right = value(before), value(after)
    is_plain = isinstance(left, Tensor) and isinstance(right, Tensor) and left.dtype == right.dtype
    return is_plain and left.ndim > 0 and right.ndim > 0 and same_sizes(left.shape[-1:], right.shape[-1:])


def _is_lossless(before: fx.Node, after: fx.Node) -> bool:
    left, right = tensor(before).dtype, tensor(after).dtype
    return left == right or left.itemsize < right.itemsize


def _gate(experts: ExpertsBlock, source: fx.Node) -> fx.Node:
    """The linear layer of the hidden states on which ids and weights rest."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = {experts.x, source}
    waiting = [experts.topk_ids, experts.topk_weights]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if operation(node) == "linear" and _views(node_argument(node, 0, "input"))[-1] is source:
            found.add(node)
        else:
            waiting += node.all_input_nodes
    require(len(found) == 1, f"{len(found)} linear layers of its hidden states make its routing, not 1")
    return found.pop()


def _gate_weights(product: fx.Node, experts: ExpertsBlock) -> tuple[fx.Node, fx.Node | None]:
    """(gate [E, H], router_bias [E] or None), as they are stored."""
    gate = _views(node_argument(product, 1, "weight"))[-1]
    bias = argument(product, 2, "bias")
    rows = (tensor(experts.gate_up).shape[0], tensor(experts.x).shape[1])
    sizes, dtypes = tensor(gate).shape, [tensor(node).dtype for node in (gate, experts.gate_up)]
    require(same_sizes(sizes, rows), f"its gate is {list(sizes)}, not {list(rows)}")
    require(dtypes[0] == dtypes[1], f"its gate is {dtypes[0]} and its experts are {dtypes[1]}")
    return gate, _views(bias)[-1] if isinstance(bias, fx.Node) else None


def _require_exact(routed: Routed) -> None:
    """The kernels compute logits and scores in fp32. Where the graph rounds them, it may choose other experts."""
    logits, inputs = routed.logits, (routed.logits, *routed.hidden)
    dtype = str(tensor(logits).dtype).removeprefix("torch.")
    require(dtype == "float32", f"its logits are {dtype}; the kernels', in fp32, may choose other experts")
    scores = {logits}
    for node in region([routed.topk_ids], inputs, until=routed.until):
        if scores.intersection(node.all_input_nodes):
            scores.add(node)
            found = value(node)
            is_rounded = isinstance(found, Tensor) and found.is_floating_point() and found.dtype.itemsize < 4
            require(not is_rounded, f"its experts are chosen by scores that {operation(node)} rounds")
    for node in logits.graph.nodes:
        if node is routed.until:
            break
        target = written(node)
        is_kept = target is None or not storages([target]) & storages([logits])
        require(is_kept, f"its logits are written to by {node.name}")


def _compiled(experts: ExpertsBlock, router: Router, *, has_router_bias: bool) -> str:
    count, outputs, inputs = tensor(experts.down).shape
    hidden, intermediate = (inputs, outputs) if experts.transposed else (outputs, inputs)
    try:
        return fused_text(
            LayerShape(
                tokens=1,
                hidden=hidden,
                intermediate=intermediate,
                experts=count,
                top_k=tensor(experts.topk_ids).shape[1],
                dtype=cast(DType, str(tensor(experts.gate_up).dtype).removeprefix("torch.")),
                router=router,
                activation=experts.gate.activation,
                has_router_bias=has_router_bias,
                has_expert_bias=experts.gate_up_bias is not None,
                transposed=experts.transposed,
                interleaved=experts.gate.interleaved,
            )
        )
    except MoeccError as error:
        raise UnmatchedError(str(error)) from None


def _launches(ir: str, x: Tensor) -> tuple[int, ...]:
    counts = [x.shape[0]] if isinstance(x.shape[0], int) else [1, MANY_TOKENS]
    try:
        with _disable_current_modes():  # tuned configs are checked by running them
            launches = [len(block_launcher(ir, token_bucket(n)).launches_on(x.device, n)) for n in counts]
    except (MoeccError, RuntimeError) as error:
        raise UnmatchedError(f"its layer as a whole has no kernels here: {error}") from None
    return tuple(dict.fromkeys(launches))
