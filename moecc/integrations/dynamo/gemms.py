"""The matrix products of routed experts in a graph, two of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    argument,
    is_one,
    module_path,
    node_argument,
    operation,
    require,
    same_sizes,
    storage,
    tensor,
    value,
    written,
)

GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
BATCHED = ("bmm", "matmul")
RESHAPES = ("view", "reshape", "squeeze", "unsqueeze", "flatten", "getitem")


class Gemm(NamedTuple):
    """rows [S, in], of which every one meets its expert's matrix of `weight`: result [S, out].

    weight: [E, out, in], or `transposed` [E, in, out]. experts: what says which row is whose; in a grouped product
    the ends of the experts' rows [E], in a batched one the expert of every row [S].
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    experts: fx.Node
    result: fx.Node


class Finished(NamedTuple):
    """A product with what is done to its rows at once: `rows` [S, out] in the end.

    bias [E, out] and bias_experts [S]: whose bias each row got. masks [S, 1]: rows that were set to zero.
    """

    rows: fx.Node
    bias: fx.Node | None
    bias_experts: fx.Node | None
    masks: tuple[fx.Node, ...]


class Form(NamedTuple):
    """A way to write the products of experts. is_grouped: rows of one expert stand together.

    key: what the two products of one block share, None for any other node.
    """

    name: str
    is_grouped: bool
    key: Callable[[fx.Node], Hashable | None]
    read: Callable[[fx.Node], Gemm]


def grouped_key(node: fx.Node) -> fx.Node | None:
    """The ends of the experts' rows."""
    offsets = argument(node, 2, "offs") if operation(node) in GROUPED else None
    return offsets if isinstance(offsets, fx.Node) else None


def read_grouped(node: fx.Node) -> Gemm:
    """`grouped_mm(rows, matrices [E, in, out], offs)`."""
    for name in ("bias", "out_dtype"):
        require(node.kwargs.get(name) is None, f"{operation(node)} is given {name}")
    rows, (weight, swapped) = node_argument(node, 0, "input"), _stored(node_argument(node, 1, "weight"))
    is_of_rows = tensor(rows).ndim == 2 and tensor(weight).ndim == 3
    require(is_of_rows, f"{operation(node)} is no product of rows with a matrix of their expert")
    return Gemm(node, rows, weight, not swapped, node_argument(node, 2, "offs"), node)


def batched_key(node: fx.Node) -> fx.Node | None:
    """The experts whose matrices were gathered, one for every row."""
    if operation(node) not in BATCHED:
        return None
    operands = [arg for arg in node.all_input_nodes if isinstance(value(arg), Tensor)]
    gathered = [found for arg in operands if (found := gathered_by(_stored(arg)[0], ndim=3)) is not None]
    return gathered[0][1] if len(gathered) == 1 else None


def read_batched(node: fx.Node) -> Gemm:
    """`bmm(matrices[experts], rows[:, :, None])` or `bmm(rows[:, None], matrices[experts])`."""
    left, right = node_argument(node, 0, "input"), node_argument(node, 1, "mat2")
    is_right = gathered_by(_stored(left)[0], ndim=3) is None
    matrices, swapped = _stored(right if is_right else left)
    gathered = gathered_by(matrices, ndim=3)
    assert gathered is not None, "it has a key"
    column = left if is_right else right
    rows, result = flat(column, of=2), next(iter(node.users), None)
    is_single = tensor(column).ndim == 3 and is_one(tensor(column).shape[1 if is_right else 2])
    if (
        rows is None
        or result is None
        or not is_single
        or flat(result, of=3) is not node
        or len(node.users) > 1
    ):
        raise UnmatchedError(f"{operation(node)} is no product of single rows")
    return Gemm(node, rows, gathered[0], is_right is not swapped, gathered[1], result)


def dense_key(node: fx.Node) -> str | None:
    """The module of a product with a stack of weights that no routing has chosen from."""
    is_product = operation(node) in BATCHED and batched_key(node) is None
    stacks = [arg for arg in node.all_input_nodes if arg.op == "placeholder" and is_matrices(arg)]
    return module_path(node) if is_product and stacks else None


def read_dense(node: fx.Node) -> Gemm:
    """Llama4 and the like."""
    raise UnmatchedError("every expert computes every token, there is no routing to go by")


def is_matrices(node: fx.Node) -> bool:
    """Whether a value is a matrix for each expert."""
    found = value(node)
    return isinstance(found, Tensor) and found.ndim == 3


FORMS = (
    Form("grouped_mm", True, grouped_key, read_grouped),
    Form("batched_mm", False, batched_key, read_batched),
    Form("dense", False, dense_key, read_dense),
)


def products(graph: fx.Graph) -> Iterator[tuple[Form, list[fx.Node]]]:
    """The products that share an assignment of rows to experts, block after block: two in what can be fused."""
    for form in FORMS:
        found: dict[Hashable, list[fx.Node]] = {}
        for node in graph.nodes:
            if (key := form.key(node)) is not None:
                found.setdefault(key, []).append(node)
        for nodes in found.values():
            yield form, nodes


def finish(rows: fx.Node) -> Finished:
    """Follows a product through the bias and the masks that come next."""
    bias: fx.Node | None = None
    bias_experts: fx.Node | None = None
    masks: list[fx.Node] = []
    seen: set[fx.Node] = set()
    while True:
        readers = [user for user in rows.users if user not in seen]
        if not readers or (after := _value_after(rows, readers)) is None:
            break
        added, mask = _added_bias(rows, readers[0]), masked_by(readers[0])
        if added is not None and bias is None:
            bias, bias_experts = added
        elif mask is not None:
            masks.append(mask)
        else:
            break
        seen.add(readers[0])
        rows = after
    return Finished(rows, bias, bias_experts, tuple(masks))


def gathered_by(node: fx.Node, *, ndim: int) -> tuple[fx.Node, fx.Node] | None:
    """(source, index [S]) where a node is source[index], one entry of an `ndim` source for every row."""
    if operation(node) == "getitem":
        source, index = argument(node, 0, "input"), argument(node, 1, "index")
    elif operation(node) == "index_select" and argument(node, 1, "dim") == 0:
        source, index = argument(node, 0, "input"), argument(node, 2, "index")
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(index, fx.Node):
        return None
    whole, rows = value(source), value(index)
    if not isinstance(whole, Tensor) or not isinstance(rows, Tensor):
        return None
    is_gather = (
        whole.ndim == ndim and rows.ndim == 1 and not rows.is_floating_point() and rows.dtype != torch.bool
    )
    return (source, index) if is_gather else None


def masked_by(node: fx.Node) -> fx.Node | None:
    """The mask where a node sets what is masked to zero."""
    if operation(node) not in ("masked_fill", "masked_fill_") or argument(node, 2, "value") != 0:
        return None
    return node_argument(node, 1, "mask")


def _value_after(rows: fx.Node, readers: list[fx.Node]) -> fx.Node | None:
    """What everybody else reads once the first reader is done; None where some read what it started from."""
    if written(readers[0]) is rows and not readers[0].users:
        return rows
    return readers[0] if len(readers) == 1 else None


def _added_bias(rows: fx.Node, user: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(bias [E, out], experts [S]) where a node adds to every row the bias of its expert."""
    if operation(user) not in ("add", "add_", "iadd") or len(user.args) != 2 or user.kwargs:
        return None
    others = [other for other in user.args if other is not rows]
    return gathered_by(others[0], ndim=2) if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _stored(matrices: fx.Node) -> tuple[fx.Node, bool]:
    """(the matrices as they are stored, whether these are a transposed view of those)."""
    source = matrices.args[0] if matrices.args else None
    before = value(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(before, Tensor) or before.ndim != 3:
        return matrices, False
    after = tensor(matrices).transpose(-2, -1)
    is_view = storage(source) == storage(matrices) and same_sizes(before.shape, after.shape)
    return (source, True) if is_view and same_sizes(before.stride(), after.stride()) else (matrices, False)


def flat(node: fx.Node, *, of: int) -> fx.Node | None:
    """What a node reshapes by axes of size one alone: a tensor of `of` axes; None for any other node."""
    source = node.args[0] if node.args and operation(node) in RESHAPES else None
    if (
        not isinstance(source, fx.Node)
        or len(node.all_input_nodes) > 1
        or not isinstance(value(source), Tensor)
    ):
        return None
    sizes = [[size for size in tensor(n).shape if not is_one(size)] for n in (source, node)]
    return source if tensor(source).ndim == of and same_sizes(*sizes) else None
