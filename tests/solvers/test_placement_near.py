"""Balance under dispatch `nearest`: the search sees the loads that the engine's rule makes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import PlacementProblem, solve
from moecc.solvers.placement.balance import DeviceLoads, layer_loads
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.near import NearDeviceLoads
from moecc.solvers.placement.served import loads_of
from moecc.solvers.placement.start import to_placement
from moecc.solvers.routing import Routing


def routing(rng, *, tokens, experts, homes, layers=1, top_k=2, name="a", weight=1.0):
    keys = rng.random((tokens, layers, experts)) * rng.uniform(0.2, 1.0, experts)
    ids = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int16)
    at = None if homes is None else np.minimum(rng.geometric(0.4, tokens) - 1, homes - 1).astype(np.int32)
    return Routing(name, ids, experts, np.arange(tokens, dtype=np.int32), weight, homes=at)


def problem_of(workloads, *, devices, per_node, width, **options) -> PlacementProblem:
    given_ = {"objective": "load", "dispatch": "nearest", "time_limit_s": 20.0}
    return PlacementProblem(
        workloads=tuple(workloads),
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=width,
        **(given_ | options),
    )


def served_loads(problem, workload, held, layer):
    """[devices]: every token walked from every home it may have, to the replicas that the rule names."""
    loads = np.zeros(problem.devices)
    for token, chosen in enumerate(workload.topk_ids[:, layer].tolist()):
        homes = range(problem.devices) if workload.homes is None else [int(workload.homes[token])]
        for home, expert in itertools.product(homes, chosen):
            replicas = [d for d in range(problem.devices) if expert in held[d]]
            node = [d for d in replicas if d // problem.devices_per_node == home // problem.devices_per_node]
            serving = [home] if home in replicas else node or replicas
            loads[serving] += 1 / len(homes) / len(serving)
    return loads / workload.topk_ids[:, layer].size


def imbalance(problem, held, layer) -> float:
    each = [served_loads(problem, w, held, layer) * problem.devices for w in problem.workloads]
    if problem.balance == "pooled":
        return float((problem.shares @ np.array(each)).max())
    peaks = [row.max() for row in each]
    return max(peaks) if problem.balance == "worst" else float(problem.shares @ peaks)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, devices, per_node, width = draw(
        st.sampled_from([(4, 4, 2, 2), (3, 4, 2, 1), (4, 2, 2, 3), (4, 3, 1, 2), (5, 4, 4, 2)])
    )
    homes = draw(st.sampled_from([None, devices]))
    workloads = [
        routing(rng, tokens=12, experts=experts, homes=homes, layers=2),
        routing(rng, tokens=7, experts=experts, homes=None, layers=2, name="b", weight=0.4),
    ]
    shape = {"devices": devices, "per_node": per_node, "width": width}
    return problem_of(workloads, balance=draw(st.sampled_from(["workload", "pooled", "worst"])), **shape)


def all_layers(problem):
    sets = [
        frozenset(c) for c in itertools.combinations(range(problem.num_experts), problem.slots_per_device)
    ]
    options = itertools.product(sets, repeat=problem.devices)
    return [o for o in options if len(frozenset().union(*o)) == problem.num_experts]


@settings(max_examples=15)
@given(problems())
def test_small_cases_equal_brute_force(problem):
    options = all_layers(problem)
    best = np.mean(
        [min(imbalance(problem, held, i) for held in options[:: len(options) // 400 + 1]) for i in (0, 1)]
    )
    found = solve(problem)
    rows = found.placement.physical_to_logical.reshape(2, problem.devices, -1).tolist()
    own = np.mean([imbalance(problem, [set(d) for d in row], i) for i, row in enumerate(rows)])
    assert found.certificate.objective == pytest.approx(own, rel=1e-9)
    assert imbalance_of(found.placement, problem) == pytest.approx(own, rel=1e-9)
    assert found.certificate.objective <= best + 1e-9
    if problem.near or len(options) <= 400:
        assert found.certificate.status == "optimal"
    if len(options) <= 400:
        assert found.certificate.objective == pytest.approx(best, rel=1e-9)


@settings(max_examples=25)
@given(problems(), st.integers(0, 2**32 - 1))
def test_swaps_give_the_loads_of_a_fresh_count(problem, seed):
    rng = np.random.default_rng(seed)
    table = layer_loads(problem)[0]
    options = all_layers(problem)
    held = options[rng.integers(len(options))]
    pairs = sorted((e, d) for d, device in enumerate(held) for e in device)
    experts, device_of = (np.array(column) for column in zip(*pairs, strict=True))
    loads = loads_of(table, experts, device_of)
    assert isinstance(loads, NearDeviceLoads) == problem.near
    assert loads.imbalance == pytest.approx(imbalance(problem, held, 0), rel=1e-9)
    assert loads.imbalance >= lower_bound(table, problem.slots_per_device) - 1e-9
    units = np.arange(len(experts))
    after = loads.after_swaps(units[:, None], units[None, :], device_of)
    squares = loads.square_changes(units[:, None], units[None, :], device_of)
    for u, v in itertools.combinations(units.tolist(), 2):
        a, b = int(device_of[u]), int(device_of[v])
        if a == b or experts[v] in held[a] or experts[u] in held[b]:
            continue
        swapped = device_of.copy()
        swapped[u], swapped[v] = b, a
        fresh = loads_of(table, experts, swapped)
        assert after[u, v] == pytest.approx(fresh.imbalance, rel=1e-9)
        grown = ((fresh.sums**2).sum(axis=1) - (loads.sums**2).sum(axis=1)) @ table.shares / 2
        assert squares[u, v] == pytest.approx(grown, abs=1e-9)
        loads.swap(u, v, a, b)
        assert loads.sums == pytest.approx(fresh.sums, abs=1e-9)
        loads.swap(u, v, b, a)


def test_one_node_and_random_homes_are_even():
    workload = routing(np.random.default_rng(0), tokens=50, experts=6, homes=None)
    problem = problem_of([workload], devices=4, per_node=4, width=2)
    assert not problem.near
    table = layer_loads(problem)[0]
    experts = np.repeat(np.arange(6), [2, 2, 1, 1, 1, 1])
    assert type(loads_of(table, experts, np.array([0, 1, 0, 1, 2, 2, 3, 3]))) is DeviceLoads


def test_a_cap_holds_for_what_the_rule_serves():
    rng = np.random.default_rng(1)
    workload = routing(rng, tokens=400, experts=16, homes=8, top_k=4)
    options = {"devices": 8, "per_node": 4, "width": 3, "time_limit_s": 6.0}
    near = problem_of([workload], **options)
    found = solve(near)
    even = solve(problem_of([workload], dispatch="even", **options))
    assert imbalance_of(found.placement, near) < imbalance_of(even.placement, near)
    cap = 1.02 * found.certificate.objective
    capped = problem_of([workload], objective="traffic", max_imbalance=cap, **options)
    assert imbalance_of(solve(capped).placement, capped) <= cap + 1e-9


def test_batches_are_served_by_the_nearest_too():
    workload = routing(np.random.default_rng(2), tokens=200, experts=8, homes=4)
    problem = problem_of(
        [workload], devices=4, per_node=2, width=3, balance="cvar", batch_tokens=16, time_limit_s=3.0
    )
    table = layer_loads(problem)[0]
    experts, device_of = (
        np.repeat(np.arange(8), [2, 2, 2, 2, 1, 1, 1, 1]),
        np.array([0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 2, 3]),
    )
    placement = to_placement(problem, [(experts, device_of)])
    assert loads_of(table, experts, device_of).imbalance == pytest.approx(
        imbalance_of(placement, problem), rel=1e-9
    )
