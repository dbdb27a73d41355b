"""Puts moecc's op where a graph has the experts of a layer, and says what became of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

import moecc.integrations.experts_op  # noqa: F401 - registers the op, also for graphs that a cache brings
from moecc.integrations.dynamo.experts import ExpertsBlock, match_experts
from moecc.integrations.dynamo.gemms import Form, products
from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    module_path,
    operation,
    region,
    require,
    storages,
    tensor,
    written,
)


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
class Finding:
    """One block of a graph: either its shape, where it became an op of moecc, or the reason why it was left.

    module: its path in the model, as far as the graph knows. form: how its products were written.
    """

    module: str
    form: str
    reason: str | None = None
    shape: Shape | None = None


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
        inside = region([block.output], block.inputs)
        rows = _rows(block, inside)
        _require_private(block, rows)
        _require_unwritten(block, inside, rows)
    except UnmatchedError as reason:
        return Finding(module=module, form=written_as, reason=str(reason))
    _replace(block, autocast=autocast)
    _erase(inside)
    return Finding(module=module, form=written_as, shape=_shape(block))


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


def _rows(block: ExpertsBlock, inside: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed from hidden states, as opposed to what follows from the routing alone."""
    rows: set[fx.Node] = set()
    for node in inside:
        if rows.intersection(node.all_input_nodes) or block.x in node.all_input_nodes:
            rows.add(node)
    return rows


def _require_private(block: ExpertsBlock, rows: set[fx.Node]) -> None:
    """The rows of the products stay inside; what follows from the routing alone may be read by others too."""
    for node in rows - {block.output}:
        outside = [user.name for user in node.users if user not in rows]
        require(not outside, f"{node.name}, which the op does not give, is read by {', '.join(outside)}")


def _require_unwritten(block: ExpertsBlock, inside: Sequence[fx.Node], rows: set[fx.Node]) -> None:
    """The op reads its tensors where the block ends, and what was evaluated is what stands there: nobody may write to
    the former once the block has begun, nor to a value of the routing once the rows have met it.
    """
    memory: set[int] = set()
    for node in block.output.graph.nodes:
        if node is block.output:
            return
        if node is inside[0]:
            memory |= storages(block.inputs)
        target = written(node)
        if target is not None:
            is_read = bool(storages([target]) & memory)
            require(not is_read, f"{target.name}, which the op reads, is written to by {node.name}")
        if node in rows:
            memory |= storages(value for value in node.all_input_nodes if value not in rows)


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


def _erase(inside: Sequence[fx.Node]) -> None:
    """Erases what nobody reads now; values that are read elsewhere stay, and so do writes to them."""
    within = set(inside)
    kept = {node for node in inside if any(user not in within for user in node.users)}
    size = -1
    while size != len(kept):
        size, memory = len(kept), storages(kept)
        kept |= {source for node in kept for source in node.all_input_nodes if source in within}
        kept |= {n for n in inside if (target := written(n)) is not None and storages([target]) & memory}
    for node in reversed(inside):
        if node not in kept and not node.users:
            node.graph.erase_node(node)
