"""The judge itself: it follows transformers' definition of a router, and cannot be deceived by a broken one."""

from __future__ import annotations

import math

import pytest
import torch

from moecc.codegen.config import LayerShape
from moecc.ir.semantics import Router
from moecc.runtime import reference
from moecc.runtime.ranks import Ranks

SHAPE = LayerShape(
    tokens=3, hidden=4, intermediate=4, experts=6, top_k=2, shared=1, router=Router(normalize=True)
)
SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.0]]).double().repeat(3, 1)


def _error(ids: list[int]) -> float:
    selection = reference.Selection(SCORES, SCORES)
    return reference.selection_error(SHAPE, selection, torch.tensor([[1, 3, 6], ids, [3, 1, 6]]))


def test_a_right_selection_has_no_error() -> None:
    assert _error([1, 3, 6]) == 0.0


def test_a_worse_expert_costs_its_shortfall() -> None:
    assert math.isclose(_error([1, 2, 6]), 0.8 - 0.3)


def test_what_is_no_selection_is_infinitely_wrong() -> None:
    assert _error([1, 1, 6]) == math.inf
    assert _error([1, 6, 6]) == math.inf
    assert _error([-1, 3, 6]) == math.inf
    assert _error([1, 3, 5]) == math.inf


def test_sparsemixer_weighs_each_expert_against_those_near_it() -> None:
    """By hand: within 0.4 of 2.0 are 1.9 and 1.7; when 2.0 is taken, 1.7 is within 0.38 of 1.9, and -3.0 of neither."""
    router = Router(score="sparsemixer", jitter=0.1)
    logits = torch.tensor([[1.7, 2.0, -3.0, 1.9]]).double()
    selection = reference.select(router, logits, None)
    assert torch.equal(selection.selecting, logits)
    weights = reference.routing_weights(router, selection, torch.tensor([[1, 3]]))
    first = 1 / (1 + math.exp(-0.1) + math.exp(-0.3))
    second = 1 / (1 + math.exp(-0.2))
    torch.testing.assert_close(weights, torch.tensor([[first, second]]).double())


@pytest.mark.parametrize(
    ("distance", "counted", "tolerated"),
    [(0.4 + 1e-6, True, True), (0.4 - 1e-6, False, True), (0.41, True, False), (0.39, False, False)],
)
def test_a_logit_on_the_edge_of_near_may_fall_to_either_side(
    distance: float, counted: bool, tolerated: bool
) -> None:
    """Near 2.0 is what lies within 0.4 of it; a kernel's logits are rounded, and may be counted otherwise."""
    router, ids = Router(score="sparsemixer", jitter=0.1), torch.tensor([[0]])
    selection = reference.select(router, torch.tensor([[2.0, 2.0 - distance]]).double(), None)
    found = torch.tensor([[1 / (1 + math.exp(-distance)) if counted else 1.0]]).double()
    weights = reference.nearest_weights(router, selection, ids, found)
    assert torch.allclose(weights, found) == tolerated


def test_every_assignment_reaches_one_rank() -> None:
    """Experts with replicas are computed once for every token, by turns."""
    slots = [[0, 1, 2], [2, 3, 4], [4, 5, 0]]
    weights = {"gate_up": torch.arange(6).double(), "gate": torch.zeros(6, 4)}
    flat = [expert for held in slots for expert in held]
    ranks = Ranks.of({"physical_to_logical_map": [flat], "devices": 3}, 0, weights)
    ids = torch.tensor([[0, 3], [4, 2], [5, 1], [2, 0], [5, 4]])
    seen = torch.full(ids.shape, -1.0).double()
    used = set()
    for device, share in enumerate(ranks.shares(ids)):
        assert share.weights["gate_up"].tolist() == slots[device]
        for token, row in zip(share.tokens.tolist(), share.local_ids.tolist(), strict=True):
            for column, slot in enumerate(row):
                if slot >= 0:
                    assert seen[token, column] == -1
                    seen[token, column] = share.weights["gate_up"][slot]
                    used.add((device, slots[device][slot]))
    assert torch.equal(seen, ids.double())
    assert {(0, 0), (2, 0)} <= used, "both replicas of expert 0 take part"
