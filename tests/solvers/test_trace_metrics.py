"""SRP and SCH against values computed by hand and against plain enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.routing import Routing, assumed_routing
from moecc.solvers.trace_metrics import locality


def routing(ids: object, experts: int, sequence_ids: object = None) -> Routing:
    array = np.asarray(ids, np.int16)
    sequences = np.zeros(len(array), np.int32) if sequence_ids is None else np.asarray(sequence_ids, np.int32)
    return Routing(name="made", topk_ids=array, num_experts=experts, sequence_ids=sequences)


def top1(*experts: int) -> list[list[list[int]]]:
    return [[[expert]] for expert in experts]


def test_srp_by_hand() -> None:
    # Segments of 2: {0,0}, {0,1}, {1,1}. Needs: expert 0: 2, 1, 0; expert 1: 0, 1, 2. Actual activations 6.
    # alpha 2: 4 matches of 4 activations: 2 * 4 / (4 + 6) = 0.8; alpha 1: 6 of 8: 2 * 6 / (8 + 6) = 6/7.
    found = locality(routing(top1(0, 0, 1, 1), 2), segment_tokens=2)
    assert found.srp == pytest.approx((6 / 7,))
    assert found.srp_size_ratio == pytest.approx((8 / 6,))


def test_srp_takes_no_segment_across_sequences() -> None:
    # 0 0 | 1 1 1: segments {0,0}, {1,1}, {1,1}: mimicked exactly.
    found = locality(routing(top1(0, 0, 1, 1, 1), 2, [7, 7, 3, 3, 3]), segment_tokens=2)
    assert found.srp == (1.0,)
    assert found.srp_size_ratio == (1.0,)


def test_sch_by_hand() -> None:
    # Room for 1 of 0 0 1 0 with segments of 2: 0 is preloaded, 1 evicts 0, 0 evicts 1: 2 misses of 4.
    assert locality(routing(top1(0, 0, 1, 0), 2), segment_tokens=2, cache_ratio=1).sch == (0.5,)
    # Room for 2 of 0 1 2 0 0 1: 2 must evict 0 or 1. Looking 1 token ahead sees 0 coming: 1 goes, and 1 misses again.
    ids = routing(top1(0, 1, 2, 0, 0, 1), 3)
    assert locality(ids, segment_tokens=2, cache_ratio=2).sch == pytest.approx((1 - 2 / 6,))
    # Looking at nothing but the token itself it evicts the least recently used, 0; then 0 evicts 1, and 1 evicts 2.
    assert locality(ids, segment_tokens=1, cache_ratio=2).sch == pytest.approx((1 - 3 / 6,))


def test_a_cache_for_all_experts_always_hits() -> None:
    made = assumed_routing("zipf", layers=2, experts=8, top_k=2, tokens=600)
    assert locality(made, cache_ratio=4).sch == (1.0, 1.0)
    assert locality(made).cache_experts == 4


def test_short_sequences_shorten_the_segment() -> None:
    found = locality(routing(top1(0, 0, 0, 1, 1), 2, [0, 0, 0, 1, 1]), segment_tokens=16)
    assert found.segment_tokens == 3
    assert found.srp == (1.0,)


def test_a_cache_below_top_k_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 1 x top_k"):
        locality(routing(top1(0, 1), 2), cache_ratio=0.5)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    experts, k = draw(st.sampled_from([(4, 1), (4, 2), (6, 2), (6, 3)]))
    tokens = draw(st.integers(2, 24))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    ids = rng.random((tokens, 2, experts)).argsort(axis=2)[:, :, :k]
    return routing(ids, experts, rng.integers(0, 3, tokens)), draw(st.integers(1, 5))


def runs(made: Routing) -> list[NDArray[np.int16]]:
    return [made.topk_ids[made.sequence_ids == s] for s in np.unique(made.sequence_ids)]


@settings(max_examples=60)
@given(routings())
def test_srp_is_the_best_of_all_segment_routers_with_a_threshold(case: tuple[Routing, int]) -> None:
    made, wanted = case
    found = locality(made, segment_tokens=wanted)
    m = found.segment_tokens
    for layer in range(2):
        needs = [
            int((ids[p : p + m, layer] == expert).sum())
            for ids in runs(made)
            for p in range(len(ids) - m + 1)
            for expert in range(made.num_experts)
        ]
        actual = sum(needs)
        scores = []
        for alpha in range(m + 1):
            on = [need for need in needs if need >= alpha]
            scores.append(2 * sum(on) / (m * len(on) + actual))
        assert found.srp[layer] == pytest.approx(max(scores))
        if len(needs) <= 8:
            every = [
                2 * sum(n for n, b in zip(needs, bits, strict=True) if b) / (m * sum(bits) + actual)
                for bits in product((0, 1), repeat=len(needs))
            ]
            assert found.srp[layer] == pytest.approx(max(every))


def simulate(sequences: list[NDArray[np.int16]], m: int, size: int) -> float:
    """Hit rate of one layer's cache, one expert at a time."""
    misses = total = 0
    for ids in sequences:
        cache: dict[int, int] = {}
        for now, chosen in enumerate(ids.tolist()):
            total += len(chosen)
            ahead = ids[now : now + m].ravel().tolist()
            for expert in chosen:
                if expert not in cache and len(cache) >= size:
                    misses += 1
                    idle = [e for e in cache if e not in chosen]
                    del cache[min(idle, key=lambda e: (ahead.count(e), cache[e], e))]
                cache[expert] = cache.get(expert, -1)
            for expert in chosen:
                cache[expert] = now
    return 1 - misses / total


@settings(max_examples=60)
@given(routings(), st.sampled_from([1.0, 1.5, 2.0]))
def test_sch_equals_a_plain_simulation(case: tuple[Routing, int], ratio: float) -> None:
    made, wanted = case
    found = locality(made, segment_tokens=wanted, cache_ratio=ratio)
    for layer in range(2):
        expected = simulate([ids[:, layer] for ids in runs(made)], found.segment_tokens, found.cache_experts)
        assert found.sch[layer] == pytest.approx(expected)
