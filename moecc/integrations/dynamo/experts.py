"""Finds the routed experts of a layer in a graph: two products of rows with their experts' matrices.

What surrounds the products is read in two ways. The path of the hidden states is followed from node to node: gather,
product, bias, activation, product, bias, weighting, un-permutation, sum. What is computed from the routing alone (the
order of the rows, its inverse, the experts' ends, masks) is evaluated on samples and has to have the values that these
need, so that argsort or sort, histc or bincount are all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from moecc.integrations.dynamo.activation import Gate, recognise
from moecc.integrations.dynamo.gemms import Finished, Form, Gemm, finish, flat, gathered_by, masked_by
from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    argument,
    is_cast,
    is_number,
    node_argument,
    operation,
    require,
    same_sizes,
    tensor,
    value,
    without_casts,
    written,
)
from moecc.integrations.dynamo.routing import Assignment, require_assignment

FLATTENS = ("view", "reshape", "flatten", "ravel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ExpertsBlock:
    """The routed experts of one layer, by the arguments of `moecc::experts`, and the value that they compute."""

    x: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node
    gate_up: fx.Node
    down: fx.Node
    gate_up_bias: fx.Node | None
    down_bias: fx.Node | None
    gate: Gate
    transposed: bool
    first: fx.Node
    output: fx.Node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors that enter it."""
        tensors = (self.x, self.topk_ids, self.topk_weights, self.gate_up, self.down)
        return (*tensors, *(bias for bias in (self.gate_up_bias, self.down_bias) if bias is not None))


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The end of a block. slots [S]: where among the assignments a row's weight stands; restored [S]: the rows in
    the order of the assignments; None where rows are in that order. output: [T, H].
    """

    topk_weights: fx.Node
    slots: fx.Node | None
    restored: fx.Node | None
    masks: tuple[fx.Node, ...]
    output: fx.Node


def match_experts(form: Form, nodes: Sequence[fx.Node]) -> ExpertsBlock:
    """The block around products that share an assignment. Raises UnmatchedError with the reason why it is none."""
    require(len(nodes) == 2, f"{len(nodes)} products share one assignment of rows to experts, not 2")
    first, second = map(form.read, nodes)
    up, down = finish(first.result), finish(second.result)
    gathered = finish(_gather(first.rows))
    x, tokens, repeats = _tokens(gathered.rows)
    combined = _combine(down)
    top_k = tensor(combined.topk_weights).shape[1]
    require(repeats is None or repeats == top_k, "its tokens are not repeated for each of their experts")
    require((up.bias is None) == (down.bias is None), "only one of its products has a bias")
    gated = _require_sizes(x, first, second, combined)
    _require_dtypes(x, first, second, combined)
    gate = recognise(up.rows, without_casts(second.rows), _sizes(second)[2], gated=gated)
    experts = (up.bias_experts, down.bias_experts, *(() if form.is_grouped else (first.experts,)))
    routing = Assignment(
        topk_ids=_ids(first.experts, combined.topk_weights),
        tokens=tokens,
        slots=combined.slots,
        restored=combined.restored,
        ends=first.experts if form.is_grouped else None,
        experts=tuple(node for node in experts if node is not None),
        masks=(*gathered.masks, *up.masks, *down.masks, *combined.masks),
        until=combined.output,
    )
    require_assignment(routing, num_experts=_sizes(first)[0])
    return ExpertsBlock(
        x=x,
        topk_ids=routing.topk_ids,
        topk_weights=combined.topk_weights,
        gate_up=first.weight,
        down=second.weight,
        gate_up_bias=up.bias,
        down_bias=down.bias,
        gate=gate,
        transposed=first.transposed,
        first=first.node,
        output=combined.output,
    )


def _sizes(gemm: Gemm) -> tuple[int, int, int]:
    """(experts, outputs, inputs) of a product."""
    sizes = tensor(gemm.weight).shape
    require(all(isinstance(size, int) for size in sizes), f"the sizes of {gemm.weight.name} are not fixed")
    experts, outputs, inputs = sizes
    return (experts, inputs, outputs) if gemm.transposed else (experts, outputs, inputs)


def _require_sizes(x: fx.Node, first: Gemm, second: Gemm, combined: Combined) -> bool:
    """Whether the first product makes gate and up, or one half alone."""
    require(first.transposed == second.transposed, "only one of its matrices is stored transposed")
    (experts, outputs, hidden), (others, hidden_out, inner) = _sizes(first), _sizes(second)
    require(experts == others, f"its products have {experts} and {others} experts")
    require(hidden == hidden_out, f"it takes {hidden} hidden states and gives {hidden_out}")
    require(
        outputs in (inner, 2 * inner), f"its first product makes {outputs} values, its second takes {inner}"
    )
    rows = (tensor(combined.topk_weights).shape[0], hidden)
    for node in (x, combined.output):
        is_same = same_sizes(tensor(node).shape, rows)
        require(is_same, f"{node.name} {list(tensor(node).shape)} is not one row of {hidden} for each token")
    return outputs == 2 * inner


def _require_dtypes(x: fx.Node, first: Gemm, second: Gemm, combined: Combined) -> None:
    """The op computes in the type of the weights; a sum that is kept in a wider one would be rounded by it."""
    dtype = tensor(first.weight).dtype
    require(dtype in DTYPES, f"its weights are {dtype}")
    require(
        tensor(second.weight).dtype == dtype, f"its weights are {dtype} and {tensor(second.weight).dtype}"
    )
    require(tensor(x).is_floating_point(), f"{x.name} is {tensor(x).dtype}")
    if tensor(combined.output).dtype.itemsize > dtype.itemsize:
        is_rounded = all(
            is_cast(user) and tensor(user).dtype.itemsize <= dtype.itemsize for user in combined.output.users
        )
        require(is_rounded, f"its sum is kept in {tensor(combined.output).dtype}, its weights are {dtype}")


def _gather(rows: fx.Node) -> fx.Node:
    """Where the rows of the first product come from, before casts and masks."""
    while is_cast(rows) or (masked_by(rows) is not None and written(rows) is None):
        rows = node_argument(rows, 0, "input")
    return rows


def _tokens(rows: fx.Node) -> tuple[fx.Node, fx.Node | None, int | None]:
    """(x, the token of each row, None) of gathered rows, (x, None, repeats) of repeated ones."""
    if (gathered := gathered_by(rows, ndim=2)) is not None:
        return (*gathered, None)
    if operation(rows) == "repeat_interleave" and argument(rows, 2, "dim") == 0:
        repeats = argument(rows, 1, "repeats")
        require(isinstance(repeats, int), "its tokens are repeated in a way that is not fixed")
        return node_argument(rows, 0, "input"), None, repeats
    raise UnmatchedError(f"its rows come from {operation(rows)}, not from a gather of tokens")


def _reader(node: fx.Node) -> fx.Node:
    """The only one that reads a value once the writes to it are done."""
    readers = [user for user in node.users if user.users or written(user) is not node]
    require(len(readers) == 1, f"{node.name} has {len(readers)} readers, where a block has one")
    return readers[0]


def _follow(node: fx.Node) -> fx.Node:
    """The reader of a value, through casts to a type that is no narrower."""
    reader = _reader(node)
    while is_cast(reader) and tensor(reader).dtype.itemsize >= tensor(node).dtype.itemsize:
        node, reader = reader, _reader(reader)
    return reader


def _combine(down: Finished) -> Combined:
    """From the products' rows to the sum of each token's."""
    weighted = _follow(down.rows)
    factors = [factor for factor in weighted.all_input_nodes if without_casts(factor) is not down.rows]
    is_weighting = operation(weighted) in ("mul", "imul", "mul_") and len(factors) == 1
    require(is_weighting, f"{operation(weighted)} follows its products, not the routing weights")
    topk_weights, slots, masks = _weights(factors[0])
    rows, restored = _follow(weighted), None
    if (gathered := gathered_by(rows, ndim=2)) is not None:
        restored, rows = gathered[1], _follow(rows)
    sizes = (*tensor(topk_weights).shape, tensor(down.rows).shape[1])
    by_token = operation(rows) in ("view", "reshape", "unflatten") and same_sizes(tensor(rows).shape, sizes)
    require(by_token, f"{operation(rows)} follows its weighting, not a sum over each token's rows")
    output = _follow(rows)
    is_sum = operation(output) == "sum" and argument(output, 1, "dim") in (1, -2, (1,), (-2,), [1], [-2])
    require(is_sum and not argument(output, 2, "keepdim"), f"{operation(output)} joins its rows, not a sum")
    return Combined(topk_weights=topk_weights, slots=slots, restored=restored, masks=masks, output=output)


def _weights(factor: fx.Node) -> tuple[fx.Node, fx.Node | None, tuple[fx.Node, ...]]:
    """(topk_weights [T, k], slots, masks) of the factor [S, 1] that weights rows."""
    weights, slots, masks = flat(factor, of=1), None, []
    while weights is not None:
        if (mask := masked_by(weights)) is not None:
            masks.append(mask)
            weights = node_argument(weights, 0, "input")
        elif slots is None and (gathered := gathered_by(weights, ndim=1)) is not None:
            weights, slots = gathered
        else:
            break
    whole = weights.args[0] if weights is not None and operation(weights) in FLATTENS else None
    if not isinstance(whole, fx.Node) or tensor(whole).ndim != 2:
        raise UnmatchedError(f"{factor.name}, by which its rows are multiplied, is no routing weight of each")
    return whole, slots, tuple(masks)


def _ids(experts: fx.Node, topk_weights: fx.Node) -> fx.Node:
    """The ids [T, k] from which the assignment was computed: integers of the weights' shape."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [experts]
    while waiting:
        node = waiting.pop()
        if node in seen or is_number(node):
            continue
        seen.add(node)
        ids = value(node)
        is_ids = isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.ndim == 2
        if is_ids and same_sizes(ids.shape, tensor(topk_weights).shape):
            found.add(node)
        else:
            waiting += node.all_input_nodes
    require(len(found) == 1, "its routing does not come from one list of expert ids for each token")
    return found.pop()
