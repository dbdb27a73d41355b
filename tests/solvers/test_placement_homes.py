"""Copies over links, replicas under dispatch rules, and chosen homes: against counts by hand and by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.solvers.placement import Placement, evaluate
from moecc.solvers.placement.check_traffic import hosts, traffic_matrix
from moecc.solvers.placement.dispatch import fractions, judge_dispatch
from moecc.solvers.placement.homes import aligned, assign, shuffle
from moecc.solvers.placement.links import Links
from moecc.solvers.routing import Routing


def trace(ids, experts, *, homes=None, sequences=None):
    ids = np.array(ids, np.int16)
    sequences = np.zeros(len(ids), np.int32) if sequences is None else np.array(sequences, np.int32)
    homes = None if homes is None else np.array(homes, np.int32)
    return Routing("chat", ids, experts, sequences, homes=homes)


def placed(rows, *, devices, per_node, experts):
    table = np.array(rows, np.int32)
    return Placement(
        physical_to_logical=table,
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=table.shape[1] // devices,
        num_experts=experts,
    )


def test_copies_by_hand():
    # Devices {0,1} {2,3} | {4,5} {6,7}, nodes of two.
    placement = placed([list(range(8))], devices=4, per_node=2, experts=8)
    ids = [[[0, 3, 6]], [[4, 5, 7]], [[0, 1, 2]]]
    metrics = evaluate(placement, trace(ids, 8, homes=[0, 0, 3]), "home")
    # Token 0, home 0: copy to 1 inside; to node 1 over its device 2, forwarded to 3. Token 1, home 0: to 2, forwarded
    # to 3. Token 2, home 3: to device 1 of node 0, forwarded to 0.
    assert metrics.copies == pytest.approx({"same node": (2 + 1 + 1) / 3, "other node": 1.0})
    assert metrics.link_cost == pytest.approx(4 / 3 + 3.2)
    assert metrics.remote_fan_out == pytest.approx((2 + 2 + 2) / 3)
    assert metrics.remote_node_fan_out == pytest.approx(1.0)
    matrix = traffic_matrix(placement, trace(ids, 8, homes=[0, 0, 3]))
    assert matrix[0, 2] == pytest.approx(2 / 3)
    assert matrix[3, 1] == matrix[1, 0] == pytest.approx(1 / 3)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_random_homes_are_the_mean_over_all_homes(seed, per_node):
    rng = np.random.default_rng(seed)
    placement = placed([rng.permutation(8), rng.permutation(8)], devices=4, per_node=per_node, experts=8)
    ids = np.argsort(rng.random((9, 2, 8)), axis=2)[:, :, :3]
    cost = rng.random((4, 4)) * (1 - np.eye(4))
    links = Links.from_matrix(cost, per_node)
    mean = evaluate(placement, trace(ids, 8), "home", links)
    each = [evaluate(placement, trace(ids, 8, homes=[h] * 9), "home", links) for h in range(4)]
    for name in ("remote_fan_out", "remote_node_fan_out", "link_cost"):
        assert getattr(mean, name) == pytest.approx(np.mean([getattr(m, name) for m in each]))
    for tier in mean.copies:
        assert mean.copies[tier] == pytest.approx(np.mean([m.copies[tier] for m in each]))
    assert sum(mean.copies.values()) >= mean.remote_fan_out - 1e-12


def test_under_migrate_the_landing_is_the_home():
    placement = placed([[0, 1, 2, 3]] * 2, devices=2, per_node=1, experts=4)
    metrics = evaluate(placement, trace([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], 4), "migrate")
    assert metrics.remote_fan_out == pytest.approx((0 + 0 + 1 + 1) / 4)


def test_homes_that_do_not_fit_are_refused():
    placement = placed([[0, 1, 2, 3]], devices=2, per_node=1, experts=4)
    for homes, message in (([2], "homes span devices 2 to 2 of 2"), ([0, 0], "homes has shape")):
        with pytest.raises(InputError, match=message):
            evaluate(placement, trace([[[0, 1]]], 4, homes=homes), "home")


def test_taken_tokens_keep_their_homes():
    taken = trace([[[0]], [[1]]], 2, homes=[1, 0]).take(np.array([False, True]))
    assert taken.homes is not None
    assert taken.homes.tolist() == [0]


# Devices {0,1} {0,2} | {0,3} {1,4}: expert 0 on three devices, 1 on two.
REPLICATED = [[0, 1, 0, 2, 0, 3, 1, 4]]


def test_nearest_replicas_by_hand():
    placement = placed(REPLICATED, devices=4, per_node=2, experts=5)
    served = fractions("nearest", hosts(placement, 0), np.ones(5) / 5, 2)
    assert served[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert served[:, 1].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert (served[:, 4] == [0, 0, 0, 1]).all()
    # Alike on all replicas where neither the device nor its node holds one.
    far = fractions("nearest", np.array([[True, True, False, False]]), np.ones(1), 2)
    assert far[2, 0].tolist() == far[3, 0].tolist() == [0.5, 0.5, 0, 0]


def test_the_least_peak_is_least():
    held = hosts(placed(REPLICATED, devices=4, per_node=2, experts=5), 0)
    loads = np.array([0.6, 0.1, 0.05, 0.05, 0.2])
    peak = (loads @ fractions("lp", held, loads, 2)[0]).max()
    # By enumeration: the load of a set of experts is shared by the devices that hold any of them.
    bound = max(
        loads[list(chosen)].sum() / held[list(chosen)].any(axis=0).sum()
        for size in range(1, 6)
        for chosen in itertools.combinations(range(5), size)
    )
    assert peak == pytest.approx(bound)
    assert fractions("lp", held, np.array([1.0, 0, 0, 0, 0]), 2)[0].sum(axis=1) == pytest.approx(np.ones(5))


@pytest.mark.parametrize("rule", ["even", "nearest", "random", "lp"])
def test_without_replicas_every_rule_is_the_same(rule):
    rng = np.random.default_rng(1)
    placement = placed([rng.permutation(8)], devices=4, per_node=2, experts=8)
    routing = trace(np.argsort(rng.random((30, 1, 8)), axis=2)[:, :, :3], 8)
    metrics, judged = evaluate(placement, routing, "home"), judge_dispatch(placement, [routing], rule)
    assert judged.imbalance == pytest.approx(metrics.imbalance)
    assert judged.pooled_imbalance == pytest.approx(metrics.imbalance)
    assert judged.fan_out == pytest.approx(metrics.fan_out)
    assert judged.remote_fan_out == pytest.approx(metrics.remote_fan_out)


def test_rules_against_a_simulation():
    rng = np.random.default_rng(5)
    placement = placed(REPLICATED, devices=4, per_node=2, experts=5)
    routing = trace(np.argsort(rng.random((400, 1, 5)), axis=2)[:, :, :2], 5, homes=rng.integers(0, 4, 400))
    held = hosts(placement, 0)
    for rule in ("even", "nearest"):
        served = fractions(rule, held, routing.loads()[0], 2)
        loads, reached, remote = np.zeros(4), 0, 0
        for _ in range(20):
            for token, home in zip(routing.topk_ids[:, 0].tolist(), routing.homes.tolist(), strict=True):
                at = [int(rng.choice(4, p=served[home % len(served), e])) for e in token]
                np.add.at(loads, at, 1)
                reached += len(set(at))
                remote += len(set(at) - {home})
        judged = judge_dispatch(placement, [routing], rule)
        assert judged.imbalance == pytest.approx(loads.max() / loads.mean(), rel=0.03)
        assert judged.fan_out == pytest.approx(reached / 8000, rel=0.02)
        assert judged.remote_fan_out == pytest.approx(remote / 8000, rel=0.03)
    first, second = (judge_dispatch(placement, [routing], "random", seed=3) for _ in range(2))
    assert first == second
    assert first.imbalance >= judge_dispatch(placement, [routing], "lp").imbalance - 1e-9


def topics(rng, *, tokens=800, sequences=16, layers=4, groups=4, experts=16):
    """Every sequence has a topic, whose experts are a group that no id order reveals."""
    topic = rng.integers(0, groups, sequences)
    names = np.sort(rng.integers(0, sequences, tokens))
    ids = np.empty((tokens, layers, 2), np.int16)
    fixed = np.random.default_rng(0)
    for layer in range(layers):
        members = fixed.permutation(experts).reshape(groups, -1)
        picked = np.argsort(rng.random((tokens, members.shape[1])), axis=1)[:, :2]
        ids[:, layer] = members[topic[names][:, None], picked]
    return Routing("topics", ids, experts, names.astype(np.int32)), topic


def test_chosen_homes_find_topics():
    rng = np.random.default_rng(2)
    train, _ = topics(rng)
    score, _ = topics(rng)
    fixed = np.random.default_rng(0)
    rows = [
        fixed.permutation(16).reshape(4, -1)[np.random.default_rng(9 + i).permutation(4)].ravel()
        for i in range(4)
    ]
    placement = placed(rows, devices=4, per_node=4, experts=16)
    named = aligned(placement, [train])
    before, after = evaluate(placement, score, "home"), evaluate(named, score, "home")
    assert after.fan_out == before.fan_out == 1
    assert after.imbalance == pytest.approx(before.imbalance)
    token = shuffle(named, [train], score, "token")
    assert token.before == pytest.approx(0.75)
    assert token.after < 0.25
    assert token.most == pytest.approx(1.0, abs=0.01)
    sequence = shuffle(named, [train], score, "sequence")
    assert sequence.after < 0.5 < sequence.before


def test_short_sequences_cannot_be_sent_by_their_prefix():
    placement = placed([[0, 1, 2, 3]], devices=2, per_node=1, experts=4)
    with pytest.raises(InputError, match="no sequence is longer than 32 tokens"):
        shuffle(placement, [], trace([[[0]]] * 5, 4), "sequence")


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_devices_take_equally_many_tokens(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    home = assign(rng.random((count, 4)), np.ones(count, np.int64))
    assert np.bincount(home, minlength=4).max() <= -(-count // 4)
