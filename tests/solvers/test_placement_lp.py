"""Balance under dispatch `lp`: the search sees the peak that an LP leaves, not the even split's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import PlacementProblem, solve
from moecc.solvers.placement.balance import layer_loads
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.lp import LpDeviceLoads
from moecc.solvers.placement.served import loads_of
from moecc.solvers.routing import Routing


def routing(rng, *, tokens, experts, layers=1, top_k=2, name="a", weight=1.0):
    keys = rng.random((tokens, layers, experts)) * rng.uniform(0.2, 1.0, experts)
    ids = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int16)
    return Routing(name, ids, experts, np.arange(tokens, dtype=np.int32), weight)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, devices, width = draw(st.sampled_from([(4, 4, 2), (3, 4, 1), (4, 2, 3), (5, 3, 2)]))
    return PlacementProblem(
        workloads=(
            routing(rng, tokens=12, experts=experts),
            routing(rng, tokens=7, experts=experts, name="b", weight=0.4),
        ),
        devices=devices,
        devices_per_node=devices,
        slots_per_device=width,
        objective="load",
        dispatch="lp",
        balance=draw(st.sampled_from(["workload", "pooled", "worst"])),
        time_limit_s=20.0,
    )


def peak(load, held) -> float:
    """The best split's fullest device: no set of devices may have to serve more than its share (Hall)."""
    devices = range(len(held))
    sets = (set(c) for n in devices for c in itertools.combinations(devices, n + 1))
    return max(
        sum(w for e, w in enumerate(load) if {d for d in devices if e in held[d]} <= chosen) / len(chosen)
        for chosen in sets
    )


def imbalance(problem, held) -> float:
    loads = np.array([w.loads()[0] for w in problem.workloads]) * problem.devices
    if problem.balance == "pooled":
        return peak(problem.shares @ loads, held)
    peaks = [peak(load, held) for load in loads]
    return max(peaks) if problem.balance == "worst" else float(problem.shares @ peaks)


def all_layers(problem):
    sets = [
        frozenset(c) for c in itertools.combinations(range(problem.num_experts), problem.slots_per_device)
    ]
    options = itertools.product(sets, repeat=problem.devices)
    return [o for o in options if len(frozenset().union(*o)) == problem.num_experts]


@settings(max_examples=15)
@given(problems())
def test_small_cases_equal_brute_force(problem):
    best = min(imbalance(problem, held) for held in all_layers(problem))
    found = solve(problem)
    held = [set(d) for d in found.placement.physical_to_logical.reshape(problem.devices, -1).tolist()]
    assert found.certificate.objective == pytest.approx(best, rel=1e-8)
    assert imbalance(problem, held) == pytest.approx(best, rel=1e-8)
    assert imbalance_of(found.placement, problem) == pytest.approx(best, rel=1e-8)
    assert found.certificate.status == "optimal"


@settings(max_examples=25)
@given(problems(), st.integers(0, 2**32 - 1))
def test_swaps_give_the_peaks_of_a_fresh_count(problem, seed):
    table, rng = layer_loads(problem)[0], np.random.default_rng(seed)
    options = all_layers(problem)
    held = options[rng.integers(len(options))]
    pairs = sorted((e, d) for d, device in enumerate(held) for e in device)
    experts, device_of = (np.array(column) for column in zip(*pairs, strict=True))
    loads = loads_of(table, experts, device_of)
    assert isinstance(loads, LpDeviceLoads)
    assert loads.imbalance == pytest.approx(imbalance(problem, held), rel=1e-9)
    assert loads.imbalance >= lower_bound(table, problem.slots_per_device) - 1e-9
    units = np.arange(len(experts))
    after = loads.after_swaps(units[:, None], units[None, :], device_of)
    for u, v in itertools.combinations(units.tolist(), 2):
        a, b = int(device_of[u]), int(device_of[v])
        if a == b or experts[v] in held[a] or experts[u] in held[b]:
            continue
        swapped = device_of.copy()
        swapped[u], swapped[v] = b, a
        fresh = loads_of(table, experts, swapped)
        assert after[u, v] == pytest.approx(fresh.imbalance, rel=1e-9)
        loads.swap(u, v, a, b)
        assert loads.peaks == pytest.approx(fresh.peaks, abs=1e-9)
        loads.swap(u, v, b, a)


def test_what_the_lp_evens_out_is_left_to_it():
    """Under a cap that only the LP can hold, traffic falls further than under the even split's."""
    workload = routing(np.random.default_rng(1), tokens=400, experts=24, top_k=4)
    even = PlacementProblem(
        workloads=(workload,),
        devices=8,
        devices_per_node=8,
        slots_per_device=4,
        max_imbalance=1.01,
        time_limit_s=15.0,
    )
    lp = replace(even, dispatch="lp")
    found = [solve(task) for task in (even, lp)]
    assert imbalance_of(found[1].placement, lp) <= 1.01 + 1e-6
    assert found[1].certificate.objective < found[0].certificate.objective
