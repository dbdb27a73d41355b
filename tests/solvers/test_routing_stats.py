"""Routing statistics against values computed by hand and by enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.routing import Routing, assumed_routing
from moecc.solvers.routing_stats import routing_stats


def routing(ids: object, experts: int, sequences: int = 1) -> Routing:
    array = np.asarray(ids, np.int16)
    return Routing(
        name="made",
        topk_ids=array,
        num_experts=experts,
        sequence_ids=(np.arange(len(array)) * sequences // len(array)).astype(np.int32),
    )


def test_load_skew_and_entropy_by_hand() -> None:
    # layer 0: experts 0, 0, 1, 2; layer 1: every expert once
    stats = routing_stats(routing([[[0], [3]], [[0], [2]], [[1], [1]], [[2], [0]]], 4, sequences=2))
    assert stats.load_skew == pytest.approx((2.0, 1.0))  # 2 of a mean of 1
    assert stats.load_entropy_bits == pytest.approx((1.5, 2.0))  # 1/2 * 1 + 2 * 1/4 * 2
    assert (stats.tokens, stats.sequences, stats.experts, stats.top_k) == (4, 2, 4, 1)
    assert stats.co_activation == (1.0, 1.0)


def test_a_layer_that_determines_the_next_tells_its_entropy_less_the_correction() -> None:
    first = np.repeat(np.arange(4), 100)
    stats = routing_stats(routing(np.stack([first, 3 - first], axis=1)[:, :, None], 4))
    # 2 bits; occupied cells 4 - rows 4 - columns 4 + 1 = -3, so 3 / (2 * 400 * ln 2) is added
    assert stats.adjacent_information_bits == pytest.approx((2 + 3 / (800 * math.log(2)),))


def test_independent_layers_tell_nothing() -> None:
    first, second = np.divmod(np.arange(1600) % 16, 4)
    stats = routing_stats(routing(np.stack([first, second], axis=1)[:, :, None], 4))
    assert stats.adjacent_information_bits == (0.0,)
    drawn = routing_stats(assumed_routing("uniform", layers=6, experts=32, top_k=4, tokens=16384))
    # uncorrected: 31 * 31 / (2 * 16384 * ln 2) = 0.042
    assert max(drawn.adjacent_information_bits) < 0.005


def test_co_activation_by_hand() -> None:
    # two teams, {0, 1} and {2, 3}, two tokens each: of 12 ordered pairs of tokens 4 share one pair of experts;
    # independent, each of 6 pairs has probability 1/6, and two tokens share 6 * 1/36 of a pair
    stats = routing_stats(routing([[[0, 1]], [[1, 0]], [[2, 3]], [[3, 2]]], 4))
    assert stats.co_activation == pytest.approx(((4 / 12) / (1 / 6),))


def test_co_activation_of_independent_choices_is_about_one() -> None:
    stats = routing_stats(assumed_routing("uniform", layers=4, experts=32, top_k=4, tokens=16384))
    assert stats.co_activation == pytest.approx((1.0,) * 4, abs=0.01)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 7))
def test_against_enumeration_in_plain_python(seed: int, tokens: int, experts: int) -> None:
    k = min(3, experts)
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(experts)[:k] for _ in range(2)] for _ in range(tokens)])
    stats = routing_stats(routing(ids, experts))

    layer = [set(token.tolist()) for token in ids[:, 0]]
    counts = [sum(e in token for token in layer) for e in range(experts)]
    assert stats.load_skew[0] == pytest.approx(max(counts) * experts / (tokens * k))
    shares = [math.comb(len(layer[a] & layer[b]), 2) for a in range(tokens) for b in range(tokens) if a != b]
    products = [counts[a] * counts[b] for a, b in combinations(range(experts), 2)]
    pairs = k * (k - 1) / 2
    independent = sum((pairs * product / sum(products)) ** 2 for product in products)
    assert stats.co_activation[0] == pytest.approx(np.mean(shares) / independent)

    joint: dict[tuple[int, int], int] = {}
    for token in ids:
        key = (int(token[0, 0]), int(token[1, 0]))
        joint[key] = joint.get(key, 0) + 1
    rows = {a: sum(n for (x, _), n in joint.items() if x == a) for a, _ in joint}
    columns = {b: sum(n for (_, y), n in joint.items() if y == b) for _, b in joint}
    plug_in = sum(n / tokens * math.log2(n * tokens / (rows[a] * columns[b])) for (a, b), n in joint.items())
    bias = (len(joint) - len(rows) - len(columns) + 1) / (2 * tokens * math.log(2))
    assert stats.adjacent_information_bits[0] == pytest.approx(max(0.0, plug_in - bias), abs=1e-9)
