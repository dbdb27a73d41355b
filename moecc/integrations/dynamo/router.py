"""Which router stands between logits and the experts' ids and weights: the one that computes the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from moecc.integrations.dynamo.evaluate import Sizes, evaluate
from moecc.integrations.dynamo.graph import UnmatchedError, is_number, region, require, tensor, value
from moecc.ir.semantics import GroupScore, Router, Score, why_impossible
from moecc.runtime.reference import routing_weights, select

ROWS = 96  # of logits on which a router is tried
SMALLEST = 32  # tokens of a sample, where their count is not fixed
# Logits of a row: (the distance between the largest and the smallest, where their middle is). Below -46 the sum of
# sigmoids is small enough for a norm_eps of 1e-20 to count.
SPREADS = ((8.0, 0.0), (64.0, -28.0), (8.0, -46.0))


class Routed(NamedTuple):
    """The values of a graph from which a router's ids and weights follow. hidden: what else may be named, but not
    counted with: `type_as` names it. until: where the block ends.
    """

    logits: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node
    hidden: tuple[fx.Node, ...]
    until: fx.Node


class Recognised(NamedTuple):
    """A router and the value that it adds to its scores before it selects."""

    router: Router
    correction_bias: fx.Node | None


class _Sample(NamedTuple):
    """logits [ROWS or more, experts] and bias [experts], float64; ids and weights [.., top_k] that follow."""

    logits: Tensor
    bias: Tensor | None
    ids: Tensor
    weights: Tensor


def recognise_router(routed: Routed, experts: int) -> Recognised:
    """The router that agrees with the graph on logits of many sizes, in float64.

    A softmax of the selected logits is the softmax of all, normalised: the second is what is given. Raises
    UnmatchedError where no router agrees.
    """
    boundary = (routed.logits, *routed.hidden)
    inside = region([routed.topk_ids, routed.topk_weights], boundary, until=routed.until)
    bias = _correction_bias(inside, experts)
    sample = _sample(routed, inside, bias, experts)
    numbers = sorted({number for node in inside for number in _numbers(node)})
    for router in _selecting(numbers, experts, sample.ids.shape[1], has_bias=bias is not None):
        if (found := _weighting(router, numbers, sample)) is not None:
            return Recognised(found, bias)
    raise UnmatchedError("what its router computes from the logits agrees with no router of the kernels")


def _correction_bias(inside: Sequence[fx.Node], experts: int) -> fx.Node | None:
    """The one tensor beside the logits that the router reads."""
    read = [node for node in inside if not node.op.startswith("call_") and not is_number(node)]
    if not read:
        return None
    is_bias = len(read) == 1 and isinstance(value(read[0]), Tensor) and tensor(read[0]).numel() == experts
    require(is_bias, f"its router reads {', '.join(node.name for node in read)}")
    return read[0]


def _numbers(node: fx.Node) -> Iterator[float]:
    """Every positive number that stands in the graph here, also in tuples."""

    def visit(argument: Any) -> Iterator[float]:
        if isinstance(argument, (tuple, list)):
            for item in argument:
                yield from visit(item)
        elif isinstance(argument, (int, float)) and math.isfinite(argument) and argument > 0:
            yield argument

    for argument in (*node.args, *node.kwargs.values()):
        found = value(argument) if isinstance(argument, fx.Node) and is_number(argument) else argument
        yield from visit(found)


def _sample(routed: Routed, inside: Sequence[fx.Node], bias: fx.Node | None, experts: int) -> _Sample:
    """The graph's ids and weights; where it is made for few tokens it is run again and again."""
    sizes = Sizes(SMALLEST)
    shape = tuple(map(sizes, tensor(routed.logits).shape))
    rows, device = math.prod(shape[:-1]), tensor(routed.logits).device
    inputs: dict[fx.Node, Tensor] = {}
    named = {source for node in inside for source in node.all_input_nodes}
    for node in named.intersection(routed.hidden):  # nothing agrees with what would be computed from these
        size, dtype = tuple(map(sizes, tensor(node).shape)), tensor(node).dtype
        inputs[node] = torch.full(size, torch.nan, dtype=dtype, device=device)
    drawn = None
    if bias is not None:
        drawn = torch.randn(experts, generator=torch.Generator().manual_seed(0)).double()
        inputs[bias] = drawn.to(device).view(tensor(bias).shape)
    runs = []
    for seed in range(max(2, -(-ROWS // max(rows, 1)))):
        logits = _logits(rows, experts, seed, drawn)
        runs.append((logits, *_run(routed, inputs | {routed.logits: logits.to(device).view(shape)}, sizes)))
    logits, ids, weights = map(torch.cat, zip(*runs, strict=True))
    return _Sample(logits, drawn, ids, weights)


def _run(routed: Routed, inputs: Mapping[fx.Node, Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
    outputs = [routed.topk_ids, routed.topk_weights]
    ids, weights = evaluate(outputs, inputs, sizes, what="its router", until=routed.until, keep_dtype=True)
    return ids.cpu().long(), weights.cpu().double()


def _logits(rows: int, experts: int, seed: int, bias: Tensor | None) -> Tensor:
    """[rows, experts] float64, distinct in a row, and no other in fp32: multiples of powers of two.

    With an odd seed all tokens want the same experts, which tells a router with a bound on their load: those of the
    smallest bias, so that scores that it makes large are small, and a bound on their sum counts.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, experts, generator=generator).argsort(dim=1).double()
    if seed % 2:
        order = (order[0] if bias is None else -bias).argsort().argsort().double().expand_as(order)
    kinds = torch.tensor(SPREADS).double()[(torch.arange(rows) + seed) % len(SPREADS)]
    spread, middle = kinds[:, :1], kinds[:, 1:]
    return (order - experts // 2) * torch.exp2(torch.floor(torch.log2(spread / experts))) + middle


def _selecting(numbers: Sequence[float], experts: int, top_k: int, *, has_bias: bool) -> Iterator[Router]:
    """Every way to select with the numbers that occur in the graph, the simplest first; weights are for later."""
    counts = [int(number) for number in numbers if number == int(number) and number <= experts]
    limits: list[tuple[int, int, GroupScore]] = [(1, 1, "max")]
    rules: tuple[GroupScore, ...] = ("max", "top2_sum")
    limits += [limit for limit in product(counts, counts, rules) if limit[1] < limit[0]]
    scores: tuple[Score, ...] = ("softmax", "sigmoid")
    routers = [
        Router(score=score, selection_bias=has_bias, groups=groups, top_groups=top_groups, group_score=rule)
        for (groups, top_groups, rule), score in product(limits, scores)
    ]
    if not has_bias:
        routers += [Router(score="sparsemixer", jitter=number / 2) for number in numbers if number < 1]
    return (router for router in routers if why_impossible(router, experts, top_k) is None)


def _weighting(router: Router, numbers: Sequence[float], sample: _Sample) -> Router | None:
    """The router with the normalisation and the scale that agree; None if it selects or weights otherwise."""
    selection = select(router, sample.logits, sample.bias)
    expected = selection.selecting.topk(sample.ids.shape[1], dim=1).indices
    if not torch.equal(expected.sort().values, sample.ids.sort().values):
        return None
    small = [number for number in numbers if number < 1]
    norms: list[dict[str, Any]] = [{}, {"normalize": True}]
    norms += [{"normalize": True, name: bound} for bound in small for name in ("norm_eps", "norm_min")]
    for norm, scale in product(norms, (1.0, *numbers)):
        found = replace(router, scale=float(scale), **norm)
        if why_impossible(found, sample.logits.shape[1], sample.ids.shape[1]) is not None:
            continue
        weights = routing_weights(found, selection, sample.ids)
        # Softmax in fp32 errs by 1e-6 where its logits are far apart.
        if torch.allclose(sample.weights, weights, rtol=2e-5, atol=1e-30):
            return found
    return None
