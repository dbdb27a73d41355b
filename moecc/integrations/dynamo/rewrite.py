"""Puts moecc's op where a graph has the experts of a layer, and says what became of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

import moecc.integrations.experts_op  # noqa: F401 - registers the op, also for graphs that a cache brings
from moecc.integrations.dynamo.boundary import closed_region, erase
from moecc.integrations.dynamo.experts import ExpertsBlock, match_experts
from moecc.integrations.dynamo.gemms import Form, products
from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    module_path,
    operation,
    tensor,
)
from moecc.integrations.dynamo.lift import LiftedBlock, lift


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What was recognised. tokens: their number, or its symbol where the graph serves any."""

    tokens: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    activation: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What became of a layer that was lifted with its router. launches: how many kernels one call runs.

    ir: the text behind the passes, which the op runs.
    """

    router: str
    launches: str
    ir: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One block of a graph: either its shape, where it became an op of moecc, or the reason why it was left.

    module: its path in the model, as far as the graph knows. form: how its products were written. layer: what became
    of it where its router is part of the op; router_reason: why not, where the op is of its experts alone.
    """

    module: str
    form: str
    reason: str | None = None
    shape: Shape | None = None
    layer: Layer | None = None
    router_reason: str | None = None


def rewrite(root: fx.GraphModule) -> list[Finding]:
    """Rewrites the graph and those inside it (checkpointed regions are graphs of their own) in place."""
    findings = []
    modules = [module for module in root.modules() if isinstance(module, fx.GraphModule)]
    autocast = _has_autocast(modules)
    for module in modules:
        if blocks := list(products(module.graph)):
            found = [_rewrite_block(form, nodes, autocast=autocast) for form, nodes in blocks]
            if any(finding.shape is not None for finding in found):
                module.graph.lint()
                module.recompile()
            findings += found
    return findings


def _has_autocast(modules: Sequence[fx.GraphModule]) -> bool:
    """Whether autocast is on where the graph is called, or switched on inside."""
    outside = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return outside or any(n.target is _enter_autocast for module in modules for n in module.graph.nodes)


def _rewrite_block(form: Form, nodes: Sequence[fx.Node], *, autocast: bool) -> Finding:
    module, written_as = module_path(nodes[0]), operation(nodes[0])
    try:
        block = match_experts(form, nodes)
        inside = closed_region(block.inputs, block.output, hidden=[block.x])
    except UnmatchedError as reason:
        return Finding(module=module, form=written_as, reason=str(reason))
    shape = _shape(block)
    try:
        lifted = lift(block, autocast=autocast)
    except UnmatchedError as reason:
        _replace(block, autocast=autocast)
        erase(inside)
        return Finding(module=module, form=written_as, shape=shape, router_reason=str(reason))
    layer = _layer(lifted)
    _replace_layer(lifted)
    erase(lifted.inside)
    return Finding(module=module, form=written_as, shape=shape, layer=layer)


def _layer(lifted: LiftedBlock) -> Layer:
    router = lifted.router
    traits = {
        "bias": lifted.router_bias is not None,
        "correction bias": router.selection_bias,
        f"{router.top_groups} of {router.groups} groups": router.groups > 1,
        "normalized": router.normalize,
        f"scale {router.scale:g}": router.scale != 1,
    }
    return Layer(
        router=", ".join([router.score, *(name for name, is_so in traits.items() if is_so)]),
        launches=" to ".join(map(str, lifted.launches)),
        ir=lifted.ir,
    )


def _shape(block: ExpertsBlock) -> Shape:
    experts, outputs, inputs = tensor(block.down).shape
    hidden, intermediate = (inputs, outputs) if block.transposed else (outputs, inputs)
    traits = {
        "transposed": block.transposed,
        "interleaved": block.gate.interleaved,
        "bias": block.gate_up_bias is not None,
    }
    return Shape(
        tokens=str(tensor(block.x).shape[0]),
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=tensor(block.topk_ids).shape[1],
        dtype=str(tensor(block.gate_up).dtype).removeprefix("torch."),
        activation=block.gate.activation.kind,
        layout=" ".join(name for name, is_so in traits.items() if is_so) or "natural",
    )


def _replace(block: ExpertsBlock, *, autocast: bool) -> None:
    graph, output = block.output.graph, block.output
    dtype, device = tensor(block.gate_up).dtype, tensor(block.x).device.type
    activation = block.gate.activation
    with graph.inserting_before(output):
        x = block.x if tensor(block.x).dtype == dtype else graph.call_method("to", (block.x, dtype))
        # Autocast leaves products of experts in the type of their weights, and would cast those of the op. Where there
        # is none the graph stays without the switch, which AOTAutograd's cache does not take.
        switched_off = autocast and graph.call_function(_enter_autocast, (device, None, False, None))
        replacement = graph.call_function(
            torch.ops.moecc.experts.default,
            (
                x,
                block.topk_ids,
                block.topk_weights,
                block.gate_up,
                block.down,
                block.gate_up_bias,
                block.down_bias,
                activation.kind,
                activation.alpha,
                activation.limit,
                block.transposed,
                block.gate.interleaved,
            ),
        )
        if switched_off:
            graph.call_function(_exit_autocast, (switched_off,))
        if tensor(output).dtype != dtype:
            replacement = graph.call_method("to", (replacement, tensor(output).dtype))
    replacement.meta = dict(output.meta)
    output.replace_all_uses_with(replacement)


def _replace_layer(lifted: LiftedBlock) -> None:
    block, graph, output = lifted.experts, lifted.experts.output.graph, lifted.experts.output
    with graph.inserting_before(output):
        biases = [
            bias if bias is None or tensor(bias).ndim == 1 else graph.call_method("reshape", (bias, -1))
            for bias in (lifted.router_bias, lifted.correction_bias)
        ]
        weights = (block.gate_up, block.down, block.gate_up_bias, block.down_bias)
        replacement = graph.call_function(
            torch.ops.moecc.moe_block.default, (block.x, lifted.gate, *biases, *weights, lifted.ir)
        )
        if tensor(output).dtype != tensor(block.x).dtype:
            replacement = graph.call_method("to", (replacement, tensor(output).dtype))
    replacement.meta = dict(output.meta)
    output.replace_all_uses_with(replacement)
