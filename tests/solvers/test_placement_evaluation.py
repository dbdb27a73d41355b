"""The checker against token-by-token recomputation, with replicas, homes and measured links."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import Links, Placement, evaluate, evaluate_all
from moecc.solvers.placement.check import evaluate_under
from moecc.solvers.placement.check_reach import reach_of
from moecc.solvers.placement.check_traffic import traffic_matrix
from moecc.solvers.routing import Routing


def random_placement(rng, *, layers, experts, devices, width, per_node):
    rows = []
    for _ in range(layers):
        while True:
            spare = rng.integers(0, experts, devices * width - experts)
            row = rng.permutation(np.append(np.arange(experts), spare)).reshape(devices, width)
            if all(len(set(held)) == width for held in row.tolist()):
                break
        rows.append(row.ravel())
    return Placement(
        physical_to_logical=np.array(rows, np.int32),
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=width,
        num_experts=experts,
    )


def random_routing(rng, *, tokens, layers, experts, top_k, homes=None):
    keys = rng.random((tokens, layers, experts))
    ids = np.argsort(keys, axis=2)[:, :, :top_k].astype(np.int16)
    at = None if homes is None else rng.integers(0, homes, tokens).astype(np.int32)
    return Routing("chat", ids, experts, np.zeros(tokens, np.int32), homes=at)


def holders(placement, layer):
    rows = placement.physical_to_logical[layer].reshape(placement.devices, -1).tolist()
    return [set(row) for row in rows]


def cover(held, wanted):
    """The devices of a greedy cover, in the order in which it takes them: the first is where the token lands."""
    wanted, used = set(wanted), []
    while wanted:
        gains = [len(on & wanted) for on in held]
        used.append(gains.index(max(gains)))
        wanted -= held[used[-1]]
    return used


def sent_by_hand(used, home, per_node):
    """(from, to) of every copy of one token."""
    copies = []
    for device in used:
        same = device // per_node == home // per_node
        relay = home if same else device // per_node * per_node + home % per_node
        copies += [(relay, device)] * (relay != device)
    for node in {device // per_node for device in used} - {home // per_node}:
        copies.append((home, node * per_node + home % per_node))
    return copies


SHAPES = [(4, 2, 2, 7), (4, 1, 4, 5), (6, 3, 1, 4), (6, 2, 2, 5), (3, 3, 4, 6)]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    homed=st.booleans(),
    measured=st.booleans(),
    execution=st.sampled_from(["home", "migrate"]),
)
def test_figures_equal_a_walk_over_the_tokens(seed, shape, homed, measured, execution):
    rng = np.random.default_rng(seed)
    devices, per_node, width, experts = shape
    layers, tokens, top_k = 3, 9, int(rng.integers(1, min(4, experts) + 1))
    placement = random_placement(
        rng, layers=layers, experts=experts, devices=devices, width=width, per_node=per_node
    )
    routing = random_routing(
        rng, tokens=tokens, layers=layers, experts=experts, top_k=top_k, homes=devices if homed else None
    )
    cost = rng.random((devices, devices)) * (1 - np.eye(devices))
    links = Links.from_matrix(cost, per_node) if measured else None
    price = cost if measured else Links.by_node(devices, per_node).cost

    fan_out = node_fan_out = remote = remote_nodes = same_node = other_node = paid = 0.0
    landings = np.empty((layers, tokens), np.int64)
    for layer in range(layers):
        held = holders(placement, layer)
        for token, ids in enumerate(routing.topk_ids[:, layer].tolist()):
            used = cover(held, ids)
            landings[layer, token] = used[0]
            homes = range(devices)
            if execution == "migrate":
                homes = [used[0]]
            elif homed:
                homes = [int(routing.homes[token])]
            nodes = {device // per_node for device in used}
            fan_out += len(used)
            node_fan_out += len(nodes)
            for home in homes:
                copies = sent_by_hand(used, home, per_node)
                remote += len(set(used) - {home}) / len(homes)
                remote_nodes += len(nodes - {home // per_node}) / len(homes)
                near = sum(a // per_node == b // per_node for a, b in copies)
                same_node += near / len(homes)
                other_node += (len(copies) - near) / len(homes)
                paid += sum(price[a, b] for a, b in copies) / len(homes)
    metrics = evaluate(placement, routing, execution, links)
    found = (metrics.fan_out, metrics.node_fan_out, metrics.remote_fan_out, metrics.remote_node_fan_out)
    found += (*metrics.copies.values(), metrics.link_cost)
    summed = (fan_out, node_fan_out, remote, remote_nodes, same_node, other_node, paid)
    assert found == pytest.approx([value / (tokens * layers) for value in summed], rel=1e-12, abs=1e-14)
    hops = (landings[1:] != landings[:-1]).mean() if execution == "migrate" else 0.0
    assert metrics.hops == hops


def test_chunks_and_executions_judged_together_change_nothing(monkeypatch):
    rng = np.random.default_rng(5)
    placement = random_placement(rng, layers=2, experts=6, devices=4, width=3, per_node=2)
    workloads = [
        random_routing(rng, tokens=50, layers=2, experts=6, top_k=3, homes=4),
        replace(random_routing(rng, tokens=20, layers=2, experts=6, top_k=3), name="code", weight=3.0),
    ]
    together = evaluate_under(placement, workloads, ("home", "migrate"))
    whole = reach_of(placement, 1, workloads[0].topk_ids[:, 1])
    monkeypatch.setattr("moecc.solvers.placement.check_reach.PAIRS", 40)
    monkeypatch.setattr("moecc.solvers.placement.check_survey.PAIRED", 20)
    parts = reach_of(placement, 1, workloads[0].topk_ids[:, 1])
    for field in ("token", "device", "landing"):
        assert np.array_equal(getattr(parts, field), getattr(whole, field))
    for execution, judged in together.items():
        assert evaluate_all(placement, workloads, execution) == judged
        assert np.mean(judged.layer_fan_out) == pytest.approx(judged.mean.fan_out, rel=1e-13)
        assert np.mean(judged.layer_imbalance) == pytest.approx(judged.mean.imbalance, rel=1e-13)


@pytest.mark.parametrize("homes", [None, 6])
def test_the_traffic_matrix_holds_every_copy(homes):
    rng = np.random.default_rng(6)
    placement = random_placement(rng, layers=2, experts=8, devices=6, width=2, per_node=3)
    routing = random_routing(rng, tokens=7, layers=2, experts=8, top_k=3, homes=homes)
    expected = np.zeros((6, 6))
    for layer in range(2):
        for token, ids in enumerate(routing.topk_ids[:, layer].tolist()):
            at = range(6) if homes is None else [int(routing.homes[token])]
            for home in at:
                for copy in sent_by_hand(cover(holders(placement, layer), ids), home, 3):
                    expected[copy] += 1 / (14 * len(at))
    assert traffic_matrix(placement, routing) == pytest.approx(expected, rel=1e-12)


def test_as_many_devices_as_a_fleet_has_need_no_matrix():
    devices = 1 << 16
    row = (np.arange(devices) * 7 % 256).astype(np.int32)
    placement = Placement(
        physical_to_logical=row[None],
        devices=devices,
        devices_per_node=8,
        slots_per_device=1,
        num_experts=256,
    )
    routing = random_routing(np.random.default_rng(7), tokens=16, layers=1, experts=256, top_k=4)
    metrics = evaluate(placement, routing, "home")
    lowest = [int(np.flatnonzero(row == expert)[0]) for expert in range(256)]
    used = [{lowest[expert] for expert in ids} for ids in routing.topk_ids[:, 0].tolist()]
    nodes = np.mean([len({device // 8 for device in on}) for on in used])
    assert metrics.fan_out == 4
    assert metrics.copies["same node"] == pytest.approx(4 * 7 / 8)
    assert metrics.copies["other node"] == pytest.approx(nodes * (1 - 1 / 8192))
