"""What matchers read off a graph of Dynamo: names of operations, values, views, writes."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
IN_PLACE_OPERATORS = frozenset(
    {
        operator.setitem,
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
    }
)


class UnmatchedError(Exception):
    """Why a block that was found cannot become an op of moecc: the reason that `explain` gives."""


def require(condition: bool, reason: str) -> None:
    """Raises UnmatchedError with the reason where the condition does not hold."""
    if not condition:
        raise UnmatchedError(reason)


def operation(node: fx.Node) -> str:
    """The bare name, however it was spelled: `sort` for torch.sort(x), x.sort() and aten.sort.stable alike."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    target = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def module_path(node: fx.Node) -> str:
    """`model.layers.0.mlp.experts`; empty where Dynamo did not see a module."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path, _ = list(stack.values())[-1]
    return re.sub(r"^L\['\w+'\]\.?", "", path)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument that may have been given by position or by name; None where it was not given."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def node_argument(node: fx.Node, position: int, name: str) -> fx.Node:
    """An argument that has to be a value of the graph."""
    found = argument(node, position, name)
    if not isinstance(found, fx.Node):
        raise UnmatchedError(f"{name} of {operation(node)} is {found!r}, not a value of the graph")
    return found


def value(node: fx.Node) -> Any:
    """The fake value that Dynamo saw, or None."""
    return node.meta.get("example_value")


def is_number(node: fx.Node) -> bool:
    """Whether a node is a count of tokens or the like, which a sample chooses, or a float that Dynamo left open."""
    return isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat))


def tensor(node: fx.Node) -> Tensor:
    """The fake tensor of a node that has to be one."""
    found = value(node)
    if not isinstance(found, Tensor):
        raise UnmatchedError(f"{node.name} is no tensor")
    return found


def same_sizes(left: Sequence[int | torch.SymInt], right: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are equal for every token count: asks without adding a guard."""
    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def is_one(size: int | torch.SymInt) -> bool:
    """Whether an axis has one entry in every call."""
    return isinstance(size, int) and size == 1


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype of floats, if anything."""
    source = node.args[0] if node.args else None
    if operation(node) not in CASTS or not isinstance(source, fx.Node):
        return False
    before, after = value(source), value(node)
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.device == after.device
        and before.is_floating_point()
        and after.is_floating_point()
    )


def without_casts(node: fx.Node) -> fx.Node:
    """The value before any change of its dtype."""
    while is_cast(node):
        node = cast(fx.Node, node.args[0])
    return node


def written(node: fx.Node) -> fx.Node | None:
    """The value that a node writes to in place, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    name, out = operation(node), node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    in_place = (
        node.target in IN_PLACE_OPERATORS
        or (name.endswith("_") and not name.startswith("_"))
        or node.kwargs.get("inplace") is True
    )
    target = node.args[0] if in_place and node.args else None
    return target if isinstance(target, fx.Node) else None


def storage(node: fx.Node) -> int | None:
    """What tells whether two values share memory; None for what is no tensor."""
    found = value(node)
    return found.untyped_storage()._cdata if isinstance(found, Tensor) else None


def storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory of these values."""
    return {found for node in nodes if (found := storage(node)) is not None}


def region(
    outputs: Sequence[fx.Node], inputs: Iterable[fx.Node], *, until: fx.Node | None = None
) -> list[fx.Node]:
    """What computes the outputs from the inputs, in the order of the graph, the inputs left out.

    Writes in place to values of the region belong to it, as far as the node `until`, or the last output. Numbers are
    leaves. Placeholders that are no inputs are part of it too, and writes to the memory of inputs are not: both are
    for the caller to refuse.
    """
    boundary = set(inputs)
    foreign = storages(boundary)
    order = {node: position for position, node in enumerate(outputs[0].graph.nodes)}
    last = order[until] if until is not None else max(order[node] for node in outputs)
    writes = [node for node in order if order[node] < last and written(node) is not None]
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        while waiting:
            node = waiting.pop()
            if node in found or node in boundary:
                continue
            found.add(node)
            if not is_number(node):
                waiting += node.all_input_nodes
        memory = storages(found) - foreign
        waiting = [n for n in writes if n not in found and storage(cast(fx.Node, written(n))) in memory]
    return sorted(found, key=order.__getitem__)
