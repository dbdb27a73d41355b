"""Evaluates what a block computes from its routing alone, and says what has not the values that it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moecc.integrations.dynamo.evaluate import Sizes, evaluate
from moecc.integrations.dynamo.graph import require, tensor

TOKENS = (5, 12)  # of the samples, where the count is not fixed


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which values of the graph play which part; S = T * k assignments, in the order of topk_ids [T, k] at first.

    slots [S]: the assignment of each row. tokens [S]: the token of each row. restored [S]: the row of each
    assignment. ends [E]: where the experts' rows end. experts, each [S]: the expert of each row. masks [S, 1] or [S]:
    rows without an expert here. None where a block has no such value: its rows are in the order of the assignments.
    until: where the block ends.
    """

    topk_ids: fx.Node
    tokens: fx.Node | None
    slots: fx.Node | None
    restored: fx.Node | None
    ends: fx.Node | None
    experts: tuple[fx.Node, ...]
    masks: tuple[fx.Node, ...]
    until: fx.Node


def require_assignment(assignment: Assignment, *, num_experts: int) -> None:
    """Raises UnmatchedError where the values are no grouping of the assignments by expert and its inverse."""
    for smallest in TOKENS:
        sizes = Sizes(smallest)
        tokens, top_k = map(sizes, tensor(assignment.topk_ids).shape)
        ids = _sample(tokens, top_k, num_experts, others=2 if assignment.masks else 0)
        _require_values(assignment, ids, num_experts, sizes)


def _sample(tokens: int, top_k: int, num_experts: int, *, others: int) -> Tensor:
    """Distinct ids [tokens, top_k] below num_experts, or with `others` up to that many above: experts elsewhere."""
    require(top_k <= num_experts + others, f"{top_k} of {num_experts} experts cannot be chosen")
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts + others, generator=generator).topk(top_k, dim=1).indices


def _require_values(assignment: Assignment, ids: Tensor, num_experts: int, sizes: Sizes) -> None:
    optional = (assignment.slots, assignment.tokens, assignment.restored, assignment.ends)
    wanted = [node for node in (*optional, *assignment.experts, *assignment.masks) if node is not None]
    device = tensor(assignment.topk_ids).device
    sample = ids.to(device, tensor(assignment.topk_ids).dtype)
    inputs = {assignment.topk_ids: sample}
    found = evaluate(wanted, inputs, sizes, what="its routing", until=assignment.until)
    values = {node: value.cpu() for node, value in zip(wanted, found, strict=True)}
    in_order = torch.arange(ids.numel())
    slots, tokens, restored = (values[n].long() if n is not None else in_order for n in optional[:3])
    _require_equal(slots.sort().values, in_order, "its rows are not one for each assignment")
    if assignment.tokens is None:
        tokens = slots // ids.shape[1]
    _require_equal(tokens, slots // ids.shape[1], "its rows are not those of the assigned tokens")
    _require_equal(slots[restored], in_order, "its rows do not return to the order of the assignments")
    experts = ids.flatten()[slots]
    here = experts < num_experts
    if assignment.ends is not None:
        ends = torch.bincount(experts[here], minlength=num_experts).cumsum(0)
        _require_equal(experts, experts.sort().values, "its rows are not sorted by expert")
        _require_equal(
            values[assignment.ends].long(), ends, "its products do not end where the experts' rows do"
        )
    for node in assignment.experts:
        _require_equal(values[node].long()[here], experts[here], f"{node.name} is not the expert of each row")
    for node in assignment.masks:
        _require_equal(
            values[node].flatten(), ~here, f"{node.name} masks other rows than those without an expert"
        )


def _require_equal(found: Tensor, expected: Tensor, reason: str) -> None:
    require(torch.equal(found, expected), reason)
