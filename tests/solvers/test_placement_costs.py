"""Traffic by the links: what a slow device, a slow node, a one-way switch or given homes do to a placement."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import PlacementProblem, evaluate_all, solve
from moecc.solvers.placement.labels import cheapest, nested_assignment
from moecc.solvers.placement.link_rows import link_rows
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.prices import least_link_cost
from moecc.solvers.placement.start import identity
from moecc.solvers.placement.traffic import SwapTable
from moecc.solvers.routing import Routing


def routing(rng, *, tokens=60, layers=1, experts=16, top_k=3, homes=None, name="a", weight=1.0):
    keys = rng.random((tokens, layers, experts)) * rng.uniform(0.2, 1.0, experts)
    ids = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int16)
    at = None if homes is None else rng.integers(0, homes, tokens).astype(np.int32)
    return Routing(name, ids, experts, np.arange(tokens, dtype=np.int32), weight, homes=at)


def problem_of(*workloads, cost=None, devices=4, per_node=2, width=4, **options) -> PlacementProblem:
    links = None if cost is None else Links.from_matrix(np.asarray(cost, float), per_node)
    given_ = {"devices": devices, "devices_per_node": per_node, "slots_per_device": width, "links": links}
    return PlacementProblem(workloads=tuple(workloads), **(given_ | {"time_limit_s": 20.0} | options))


def random_cost(rng, devices):
    cost = rng.uniform(0.1, 5.0, (devices, devices))
    np.fill_diagonal(cost, 0.0)
    return cost


def sent_cost(problem, held, chosen, home) -> float:
    """A token's cost from one home, walked copy by copy. held: the set of experts of each device."""
    if problem.links is not None:
        cost = problem.links.cost
    else:
        node = np.arange(problem.devices) // problem.devices_per_node
        cost = np.where(node[:, None] == node, 1.0, 3.2) * (1 - np.eye(problem.devices))
    per_node, open_, used = problem.devices_per_node, set(chosen), set()
    while open_:
        device = max(range(len(held)), key=lambda d: (len(open_ & held[d]), -d))
        open_ -= held[device]
        used.add(device)
    total = 0.0
    for node in {d // per_node for d in used}:
        relay = home if home // per_node == node else node * per_node + home % per_node
        total += cost[home, relay]
        total += sum(cost[relay, d] for d in used if d // per_node == node)
    return total


def layer_cost(problem, held, layer) -> float:
    total = 0.0
    for share, w in zip(problem.shares, problem.workloads, strict=True):
        costs = []
        for token, chosen in enumerate(w.topk_ids[:, layer].tolist()):
            homes = range(problem.devices) if w.homes is None else [int(w.homes[token])]
            costs.append(np.mean([sent_cost(problem, held, chosen, h) for h in homes]))
        total += share * float(np.mean(costs))
    return total


def held_by(placement: Placement, layer: int) -> list[set[int]]:
    return [set(row) for row in placement.physical_to_logical[layer].reshape(placement.devices, -1).tolist()]


def all_layers(experts, devices, width):
    sets = [frozenset(c) for c in itertools.combinations(range(experts), width)]
    return [o for o in itertools.product(sets, repeat=devices) if len(frozenset().union(*o)) == experts]


def layer_imbalance(problem, held, layer) -> float:
    load = sum(s * w.loads()[layer] for s, w in zip(problem.shares, problem.workloads, strict=True))
    copies = [sum(e in d for d in held) for e in range(problem.num_experts)]
    devices = [sum(load[e] / copies[e] for e in d) for d in held]
    return max(devices) / np.mean(devices)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_search_counts_what_the_check_counts(seed):
    rng = np.random.default_rng(seed)
    devices, per_node = [(4, 2), (6, 3), (4, 4), (4, 1)][seed % 4]
    homes = [None, devices][rng.integers(2)]
    cost = random_cost(rng, devices) if rng.integers(2) else None
    first = routing(rng, experts=8, homes=homes)
    second = routing(rng, experts=8, tokens=30, name="b", weight=0.4)
    problem = problem_of(
        first, second, cost=cost, devices=devices, per_node=per_node, width=-(-10 // devices)
    )
    rows = [rng.permutation(8)[: problem.slots_per_device] for _ in range(devices - 1)]
    rows.append(np.setdiff1d(np.arange(8), np.concatenate(rows))[: problem.slots_per_device])
    if len(rows[-1]) < problem.slots_per_device or len(np.unique(np.concatenate(rows))) < 8:
        row = identity(problem).physical_to_logical
    else:
        row = np.concatenate(rows)[None].astype(np.int32)
    placement = replace(identity(problem), physical_to_logical=row)
    device_of_slot = np.arange(problem.slots) // problem.slots_per_device
    order = np.lexsort((device_of_slot, row[0]))
    priced = link_rows(problem, 0, row[0][order].astype(np.int64))
    own = priced.prices.scale * priced.cost(device_of_slot[order])
    assert own == pytest.approx(layer_cost(problem, held_by(placement, 0), 0), rel=1e-12)
    table = SwapTable(priced, device_of_slot[order])
    assert priced.prices.scale * table.cost == pytest.approx(own, rel=1e-12)
    checked = evaluate_all(placement, problem.workloads, "home", problem.links).mean.link_cost
    assert own == pytest.approx(checked, rel=1e-12)
    assert least_link_cost(problem) <= own + 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_swap_costs_what_the_table_says(seed):
    rng = np.random.default_rng(seed)
    homes = [None, 6][rng.integers(2)]
    problem = problem_of(
        routing(rng, experts=12, homes=homes), cost=random_cost(rng, 6), devices=6, per_node=3, width=2
    )
    rows = link_rows(problem, 0, np.arange(12))
    table = SwapTable(rows, rng.permutation(12) // 2)
    for _ in range(5):
        u, v = rng.permutation(12)[:2].tolist()
        while table.device_of[u] == table.device_of[v]:
            u, v = rng.permutation(12)[:2].tolist()
        expected = table.cost + table.changes()[u, v]
        table.swap(u, v)
        assert table.cost == pytest.approx(expected, abs=1e-6)
        assert table.cost == pytest.approx(rows.cost(table.device_of[:-1]), abs=1e-12)


@settings(max_examples=15)
@given(st.data())
def test_small_cases_equal_brute_force(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    experts, devices, per_node, width = data.draw(
        st.sampled_from([(4, 4, 2, 1), (6, 3, 1, 2), (6, 2, 1, 3), (6, 3, 3, 2), (4, 2, 2, 3), (5, 4, 2, 2)])
    )
    homes = data.draw(st.sampled_from([None, devices]))
    cost = data.draw(st.sampled_from([None, random_cost(rng, devices)]))
    cap = data.draw(st.sampled_from([None, None, 1.15, 1.4]))
    size = {"tokens": 8, "layers": 2, "experts": experts, "top_k": 2}
    workloads = routing(rng, homes=homes, **size), routing(rng, name="b", weight=0.3, **size)
    shape = {"devices": devices, "per_node": per_node, "width": width}
    problem = problem_of(*workloads, cost=cost, max_imbalance=cap, balance="pooled", **shape)
    if not problem.linked:
        problem = replace(problem, links=Links.by_node(devices, per_node))
    options = all_layers(experts, devices, width)
    if len(options) > 700:
        options = options[:: len(options) // 700 + 1]
    scored = [
        [(layer_cost(problem, held, i), layer_imbalance(problem, held, i)) for held in options]
        for i in range(2)
    ]
    found = solve(problem)
    if cap is None:
        best = sum(min(cost for cost, _ in layer) for layer in scored) / 2
    else:
        fronts = [
            [p for p in layer if not any(q[0] <= p[0] and q[1] < p[1] for q in layer)] for layer in scored
        ]
        allowed = [
            (a[0] + b[0]) / 2 for a, b in itertools.product(*fronts) if (a[1] + b[1]) / 2 <= cap + 1e-12
        ]
        best = min(allowed, default=np.inf)
    certificate = found.certificate
    if certificate.status == "infeasible":
        assert np.isinf(best)
        assert "proven impossible" in certificate.note
        return
    assert certificate.status == "optimal"
    costs = [layer_cost(problem, held_by(found.placement, i), i) for i in range(2)]
    assert certificate.objective == pytest.approx(np.mean(costs), rel=1e-9)
    assert certificate.objective <= best * (1 + 1e-9) + 1e-12
    if len(options) == len(all_layers(experts, devices, width)):
        assert certificate.objective == pytest.approx(best, rel=1e-9, abs=1e-12)


def skewed_loads(rng, placement, layer, problem):
    """Copies that each device receives."""
    held = held_by(placement, layer)
    return [
        np.mean([bool(set(t) & d) for t in problem.workloads[0].topk_ids[:, layer].tolist()]) for d in held
    ]


def test_a_slow_device_receives_the_fewest_copies():
    rng = np.random.default_rng(1)
    cost = np.ones((8, 8)) - np.eye(8)
    cost[:, 5] *= 8
    problem = problem_of(routing(rng, experts=32, layers=2), cost=cost, devices=8, per_node=8, time_limit_s=8)
    even = replace(problem, links=Links.from_matrix(np.ones((8, 8)) - np.eye(8), 8))
    found, blind = solve(problem).placement, solve(even).placement
    for layer in range(2):
        copies = skewed_loads(rng, found, layer, problem)
        assert copies[5] == min(copies)
    judged = [
        evaluate_all(p, problem.workloads, "home", problem.links).mean.link_cost for p in (found, blind)
    ]
    assert judged[0] < 0.9 * judged[1]


def test_a_slow_node_receives_the_fewest_copies():
    rng = np.random.default_rng(2)
    cost = np.array(Links.by_node(8, 2).cost)
    cost[:4, 4:6] *= 6
    cost[6:, 4:6] *= 6
    problem = problem_of(routing(rng, experts=32), cost=cost, devices=8, per_node=2, time_limit_s=8)
    found = solve(problem).placement
    held = [set(row) for row in found.physical_to_logical[0].reshape(4, -1).tolist()]
    tokens = problem.workloads[0].topk_ids[:, 0].tolist()
    assert int(np.argmin([np.mean([bool(set(t) & node) for t in tokens]) for node in held])) == 2


def test_an_asymmetric_switch_is_used_in_its_cheap_direction():
    """Copies into devices 0 and 1 are dear, those out of them are cheap."""
    rng = np.random.default_rng(3)
    cost = np.ones((4, 4)) - np.eye(4)
    cost[2:, :2] = 10.0
    problem = problem_of(routing(rng, experts=16, tokens=200), cost=cost, per_node=4, max_imbalance=2.5)
    flipped = replace(problem, links=Links.from_matrix(cost.T, 4))
    for task, dear in ((problem, (0, 1)), (flipped, (2, 3))):
        copies = skewed_loads(rng, solve(task).placement, 0, task)
        cheap = [c for d, c in enumerate(copies) if d not in dear]
        assert max(copies[d] for d in dear) < min(cheap)


def test_given_homes_draw_their_experts():
    """Tokens of home d choose experts 4d to 4d + 3: each device should hold just those."""
    rng = np.random.default_rng(4)
    homes = rng.integers(0, 4, 200)
    ids = (np.argsort(rng.random((200, 4)), axis=1)[:, :2] + 4 * homes[:, None]).astype(np.int16)
    workload = Routing("a", ids[:, None], 16, np.arange(200, dtype=np.int32), homes=homes.astype(np.int32))
    found = solve(problem_of(workload, per_node=4))
    assert held_by(found.placement, 0) == [set(range(4 * d, 4 * d + 4)) for d in range(4)]
    assert found.certificate.objective == 0
    assert found.certificate.status == "optimal"


def test_equal_links_give_the_placement_of_no_links():
    workload = routing(np.random.default_rng(5), experts=32, layers=2)
    shape = {"devices": 8, "per_node": 8, "max_imbalance": 1.3}
    plain = solve(problem_of(workload, **shape)).placement
    priced = solve(problem_of(workload, cost=3.0 * (1 - np.eye(8)), **shape)).placement
    fan_outs = [evaluate_all(p, (workload,), "home").mean.fan_out for p in (plain, priced)]
    assert fan_outs[1] <= fan_outs[0] + 1e-12


@pytest.mark.parametrize(("devices", "per_node"), [(4, 4), (4, 1), (6, 2)])
def test_the_assignment_of_labels_is_exact(devices, per_node):
    rng = np.random.default_rng(devices * 10 + per_node)
    problem = problem_of(
        routing(rng, experts=12, homes=devices),
        cost=random_cost(rng, devices),
        devices=devices,
        per_node=per_node,
        width=12 // devices,
    )
    rows = link_rows(problem, 0, np.arange(12))
    groups = rng.permutation(12) % devices
    label = nested_assignment(rows, rows.reached(groups), per_node)
    blocks = itertools.permutations(range(devices // per_node))
    inner = list(itertools.permutations(range(per_node)))
    best = min(
        rows.cost(
            np.concatenate(
                [np.array(inside) + per_node * b for inside, b in zip(chosen, block, strict=True)]
            )[groups]
        )
        for block in blocks
        for chosen in itertools.product(inner, repeat=devices // per_node)
    )
    assert rows.cost(label[groups]) == pytest.approx(best, rel=1e-9)


def test_assignment_takes_the_least():
    costs = np.random.default_rng(6).random((6, 6))
    best = min(costs[np.arange(6), list(p)].sum() for p in itertools.permutations(range(6)))
    assert costs[np.arange(6), cheapest(costs)].sum() == pytest.approx(best)


def test_equal_traffic_is_balanced():
    """Pairs of experts go together; which pairs share a device costs nothing and decides the balance."""
    rng = np.random.default_rng(7)
    pair = np.repeat(np.arange(8), [80, 40, 20, 10, 80, 40, 20, 10])
    ids = np.stack([2 * pair, 2 * pair + 1], axis=1).astype(np.int16)[rng.permutation(300)]
    workload = Routing("a", ids[:, None], 16, np.arange(300, dtype=np.int32))
    found = solve(problem_of(workload, per_node=4))
    metrics = evaluate_all(found.placement, (workload,), "home").mean
    assert metrics.fan_out == 1
    assert metrics.imbalance == pytest.approx(90 / 75)
