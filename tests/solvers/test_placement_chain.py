"""The chain of layers under `migrate`: pairs gathered within the caps, sums kept, nodes joined, small chains exact."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import PlacementProblem, evaluate_all, identity, solve
from moecc.solvers.placement.chain import _Chain, anneal, follow_table, pull
from moecc.solvers.placement.layers import Work, begin
from moecc.solvers.placement.migrate import grouped
from moecc.solvers.placement.search import Clock
from moecc.solvers.placement.start import to_placement
from moecc.solvers.routing import Routing, assumed_routing


def streams(*, tokens=600, layers=4, experts=32, top_k=2, groups=8, seed=0, noise=0.2):
    """Tokens follow a stream through the layers; the experts of a stream in a layer are hidden by a permutation."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, top_k), np.int16)
    stream = rng.integers(0, groups, tokens)
    for layer in range(layers):
        members = rng.permutation(experts).reshape(groups, -1)
        here = np.where(rng.random(tokens) < noise, rng.integers(0, groups, tokens), stream)
        picked = np.argsort(rng.random((tokens, members.shape[1])), axis=1)[:, :top_k]
        ids[:, layer] = members[here[:, None], picked]
    return Routing("streams", ids, experts, np.arange(tokens, dtype=np.int32))


def work_of(routing, *, devices=8, width=4, cap=None, seed=0) -> Work:
    problem = PlacementProblem(
        workloads=(routing,),
        devices=devices,
        devices_per_node=devices,
        slots_per_device=width,
        execution="migrate",
        max_imbalance=cap,
        seed=seed,
    )
    work = begin(problem, Clock(deadline=time.monotonic() + 60), lambda done, total: None)
    if cap is not None:
        work.caps[:] = cap
    return work


def pairs_of(work) -> float:
    placement = to_placement(work.problem, [(w.experts, w.device_of) for w in work.layers])
    return evaluate_all(placement, work.problem.workloads, "migrate").mean.same_device_pairs


def test_the_table_and_the_pulls_add_up_to_the_pairs():
    work = work_of(streams(tokens=100))
    table = follow_table(work)
    assert table.sum(axis=(1, 2)) == pytest.approx(np.ones(3))
    worth = [
        pull(work, table, i)[np.arange(32), layer.device_of].sum() for i, layer in enumerate(work.layers)
    ]
    assert sum(worth) / 2 / 3 == pytest.approx(pairs_of(work), rel=1e-5)


@pytest.mark.parametrize("width", [4, 5])
def test_annealing_finds_streams_and_keeps_its_sums(width):
    work = work_of(streams(), width=width)
    before = pairs_of(work)
    anneal(work, follow_table(work), 1.0)
    assert pairs_of(work) > max(0.6, 2 * before)
    for layer in work.layers:
        assert (np.bincount(layer.device_of, minlength=8) == width).all()
        assert len(set(zip(layer.experts.tolist(), layer.device_of.tolist(), strict=True))) == 8 * width


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 5]), st.sampled_from([7, 8]))
def test_draws_keep_members_loads_and_holders_in_step(seed, width, devices):
    rng = np.random.default_rng(seed)
    experts = devices * 4
    routing = assumed_routing("zipf", layers=3, experts=experts, top_k=3, tokens=80, seed=seed % 1000)
    work = work_of(routing, devices=devices, width=width, cap=1.05)
    chain = _Chain(work, follow_table(work))
    noise = rng.gumbel(size=1 << 14).astype(np.float32)
    for half in (np.array([0, 2]), np.array([1])) * 6:
        chain.draw(half, chain.worth(half), 0.01, noise, rng)
    at = chain.at.argmax(axis=2)
    assert (chain.at.sum(axis=2) == 1).all()
    for layer, members in enumerate(chain.members):
        assert (at[layer][members] == np.arange(devices)[:, None]).all()
        held = np.zeros_like(chain.held[layer])
        held[chain.experts[layer], at[layer]] = True
        assert held.sum() == devices * width
        assert np.array_equal(held, chain.held[layer])
    np.testing.assert_allclose(chain.sums, chain.loads @ chain.at, atol=1e-4)


def test_a_capped_search_beats_identity_on_both_hops_and_pairs_and_repeats():
    routing = streams(tokens=300, layers=3, noise=0.4, seed=3)
    problem = PlacementProblem(
        workloads=(routing,),
        devices=8,
        devices_per_node=2,
        slots_per_device=4,
        execution="migrate",
        max_imbalance=1.15,
    )
    first, second = solve(problem), solve(problem)
    after = evaluate_all(first.placement, [routing], "migrate")
    before = evaluate_all(identity(problem), [routing], "migrate")
    assert after.imbalance("workload") <= 1.15 + 1e-9
    assert after.mean.hops < 0.8 * before.mean.hops
    assert after.mean.node_hops < 0.8 * before.mean.node_hops
    assert after.mean.same_device_pairs > 2 * before.mean.same_device_pairs
    assert np.array_equal(first.placement.physical_to_logical, second.placement.physical_to_logical)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3]))
def test_nodes_join_what_flows_most(seed, size):
    rng = np.random.default_rng(seed)
    flows = rng.random((6, 6)) ** 3
    flows = flows + flows.T
    name = grouped(flows, size, np.random.default_rng(0))
    assert sorted(name.tolist()) == list(range(6))

    def inside(node):
        same = node[:, None] == node
        return (flows * same * (1 - np.eye(6))).sum()

    best = max(inside(np.array(order) // size) for order in itertools.permutations(range(6)))
    assert inside(name // size) == pytest.approx(best)
