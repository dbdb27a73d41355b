"""Windows of two devices and changes of replicas: never worse, always a placement, and past where swaps end."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement import PlacementProblem, identity, solve
from moecc.solvers.placement.balance import DeviceLoads, LayerLoads
from moecc.solvers.placement.layers import begin
from moecc.solvers.placement.pairs import even_pairs, splits, square_changes, window
from moecc.solvers.placement.replicas import (
    imbalances,
    replace_replica,
    replaced,
    search_replicas,
    traffic_changes,
)
from moecc.solvers.placement.search import Clock, balance_layer
from moecc.solvers.placement.start import balanced_start, replicate
from moecc.solvers.placement.traffic import HomeRows, home_rows
from moecc.solvers.routing import Routing, assumed_routing


def clock() -> Clock:
    return Clock(deadline=time.monotonic() + 60)


def table_of(loads, devices, rule="mean"):
    loads = np.atleast_2d(np.asarray(loads, np.float64))
    rows = len(loads)
    return LayerLoads(
        loads=loads / loads.sum(axis=1, keepdims=True) * devices,
        shares=np.full(rows, 1 / rows),
        devices=devices,
        rule=rule,
        tail=0.5,
    )


def require_placement(experts, device_of, devices, num_experts):
    width = len(experts) // devices
    assert (np.bincount(device_of, minlength=devices) == width).all()
    assert len(set(zip(experts.tolist(), device_of.tolist(), strict=True))) == devices * width
    assert set(experts.tolist()) == set(range(num_experts))
    assert (np.diff(experts) >= 0).all()


def test_splits_list_every_way_once():
    ways = [set(np.flatnonzero(way >> np.arange(5) & 1).tolist()) for way in splits(2, 3).tolist()]
    assert sorted(map(sorted, ways)) == sorted(map(list, itertools.combinations(range(5), 2)))
    assert splits(2, 3)[0] == 0b11


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_square_changes_are_those_of_the_subsets(seed, units):
    rng = np.random.default_rng(seed)
    unit, shares, left, right = rng.random((3, units)), rng.random(3), rng.random(3), 4 + rng.random(3)
    changes = square_changes(unit, shares, left - right)
    for bits in range(1 << units):
        load = unit[:, np.flatnonzero(bits >> np.arange(units) & 1)].sum(axis=1)
        squares = shares @ ((left + load) ** 2 + (right - load) ** 2)
        assert changes[bits] == pytest.approx(squares - shares @ (left**2 + right**2), rel=1e-12, abs=1e-12)


@settings(max_examples=40)
@given(st.data())
def test_even_pairs_keep_a_placement_and_never_end_worse(data):
    devices, num_experts = data.draw(st.integers(2, 6)), data.draw(st.integers(6, 24))
    width = data.draw(st.integers(-(-num_experts // devices), num_experts))
    rule = data.draw(st.sampled_from(["mean", "worst", "cvar"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = table_of(rng.random((3, num_experts)) ** 3, devices, rule)
    experts = replicate(table.loads[0], devices * width, devices)
    device_of = balanced_start(table, experts, width)
    begun = device_of.copy()
    found = even_pairs(table, experts, device_of, floor=1.0, rng=rng, clock=clock(), until=np.inf)
    assert np.array_equal(begun, device_of)
    require_placement(experts, found.device_of, devices, num_experts)
    after = DeviceLoads(table, experts, found.device_of).imbalance
    assert found.cost == pytest.approx(after, rel=1e-9)
    assert after <= DeviceLoads(table, experts, begun).imbalance + 1e-12


def test_a_window_gains_where_no_swap_does():
    # 34 against 32: no unit of the first exceeds one of the second by 1; two units for two even them out.
    table = table_of([7, 10, 2, 15, 4, 5, 11, 12], 2)
    experts, device_of = np.arange(8), np.repeat([0, 1], 4)
    loads = DeviceLoads(table, experts, device_of)
    every = np.arange(8)
    after = loads.after_swaps(every[:, None], every[None, :], device_of)
    apart = device_of[:, None] != device_of[None, :]
    found = even_pairs(
        table, experts, device_of, floor=1.0, rng=np.random.default_rng(0), clock=clock(), until=np.inf
    )
    assert found.cost == pytest.approx(1.0)
    assert after[apart].min() >= loads.imbalance - 1e-12 > found.cost + 0.01


def test_a_window_leaves_experts_that_both_devices_hold():
    experts, device_of = np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 1])
    here, there = window(experts, device_of, 0, 1, 16, np.random.default_rng(0))
    assert (experts[here].tolist(), experts[there].tolist()) == ([1], [2])


def test_windows_end_below_swaps_alone_on_uneven_loads():
    ends = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = table_of(rng.random((2, 32)) ** 2, 4)
        experts = np.arange(32)
        start = balanced_start(table, experts, 8)
        limits = {"floor": 1.0, "clock": clock(), "until": np.inf}
        swaps = balance_layer(table, experts, start, rng=np.random.default_rng(1), **limits)
        pairs = even_pairs(table, experts, start, rng=np.random.default_rng(1), **limits)
        ends.append((pairs.cost - 1, swaps.cost - 1))
    mean = np.mean(ends, axis=0)
    assert mean[0] < mean[1]


def replicated(seed, *, devices=3, num_experts=9, spare=3):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((40, num_experts)), axis=1)[:, :4]
    weight = rng.random(40)
    table = table_of(rng.random((2, num_experts)), devices)
    experts = replicate(table.loads[0], num_experts + spare, devices)
    device_of = balanced_start(table, experts, (num_experts + spare) // devices)
    return rng, table, HomeRows(ids, weight, experts, devices), device_of


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_imbalances_after_a_replacement_equal_recomputation(seed):
    _, table, rows, device_of = replicated(seed)
    experts = rows.experts
    changes, _ = traffic_changes(rows, device_of)
    units = np.flatnonzero(np.isfinite(changes).any(axis=1))
    after = imbalances(table, experts, device_of, units)
    for row, unit in enumerate(units):
        for expert in np.flatnonzero(np.isfinite(changes[unit])):
            fresh = DeviceLoads(table, *replaced(experts, device_of, int(unit), int(expert))).imbalance
            assert after[row, expert] == pytest.approx(fresh, rel=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_replacements_that_are_open_are_those_that_keep_a_placement(seed):
    _, _, rows, device_of = replicated(seed)
    changes, cost = traffic_changes(rows, device_of)
    assert cost == pytest.approx(rows.cost(device_of))
    counts = np.bincount(rows.experts)
    for unit, expert in np.ndindex(*changes.shape):
        held = ((rows.experts == expert) & (device_of == device_of[unit])).any()
        assert np.isfinite(changes[unit, expert]) == (counts[rows.experts[unit]] > 1 and not held)
        if np.isfinite(changes[unit, expert]):
            require_placement(*replaced(rows.experts, device_of, int(unit), int(expert)), 3, 9)


def test_prices_of_replacements_follow_what_they_cost():
    """They are estimates, as the greedy cover chooses anew: what they put in order must mostly be in order."""
    agreement = []
    for seed in range(12):
        _, _, rows, device_of = replicated(seed)
        changes, cost = traffic_changes(rows, device_of)
        open_ = np.argwhere(np.isfinite(changes))
        true = []
        for unit, expert in open_.tolist():
            experts, devices = replaced(rows.experts, device_of, unit, expert)
            true.append(HomeRows(rows.ids, rows.weight, experts, 3).cost(devices) - cost)
        agreement.append(np.corrcoef(changes[tuple(open_.T)], true)[0, 1])
    assert np.mean(agreement) > 0.5


def hub(tokens=240):
    """Expert 0 goes with each of three groups of three, the first the most chosen."""
    rng = np.random.default_rng(0)
    ids = np.empty((tokens, 1, 3), np.int16)
    for token, group in enumerate(rng.choice(3, tokens, p=[0.5, 0.25, 0.25])):
        ids[token, 0] = [0, *(1 + 3 * group + rng.choice(3, 2, replace=False))]
    return Routing("hub", ids, 10, np.arange(tokens, dtype=np.int32))


def hub_work(seed=0):
    problem = PlacementProblem(
        workloads=(hub(),), devices=3, devices_per_node=3, slots_per_device=4, seed=seed
    )
    work = begin(problem, clock(), lambda done, total: None)
    layer = work.layers[0]
    # Groups together, expert 0 with the first; the spare slots hold experts that are of no use there.
    layer.experts = np.array([0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9])
    layer.device_of = np.array([0, 0, 0, 0, 1, 2, 1, 1, 1, 2, 2, 2])
    return work


def test_a_replacement_gains_where_no_swap_does():
    work = hub_work()
    layer = work.layers[0]
    before = home_rows(work.problem, 0, layer.experts)
    units = range(12)
    swapped = []
    for u, v in itertools.combinations(units, 2):
        device_of = layer.device_of.copy()
        device_of[[u, v]] = device_of[[v, u]]
        if len(set(zip(layer.experts.tolist(), device_of.tolist(), strict=True))) == 12:
            swapped.append(before.cost(device_of))
    assert min(swapped) >= before.cost(layer.device_of) - 1e-12
    changed = replace_replica(before, layer.table, layer.device_of, np.inf, np.random.default_rng(0))
    assert changed is not None
    gained = home_rows(work.problem, 0, changed[0]).cost(changed[1])
    assert gained < before.cost(layer.device_of) - 0.1


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([np.inf, 1.3]))
def test_rounds_of_replacements_never_end_worse(seed, cap):
    routing = assumed_routing("zipf", layers=1, experts=12, top_k=3, tokens=120, seed=seed)
    problem = PlacementProblem(
        workloads=(routing,), devices=4, devices_per_node=4, slots_per_device=4, seed=seed
    )
    work = begin(problem, clock(), lambda done, total: None)
    layer = work.layers[0]
    work.caps[:] = max(cap, layer.imbalance)
    before = home_rows(problem, 0, layer.experts).cost(layer.device_of)
    search_replicas(work, 0, 0, np.inf)
    require_placement(layer.experts, layer.device_of, 4, 12)
    assert home_rows(problem, 0, layer.experts).cost(layer.device_of) <= before + 1e-12
    assert layer.imbalance <= work.caps[0] + 1e-9


def test_spare_slots_go_where_the_traffic_wants_them_and_repeat():
    problem = hub_work().problem
    first, second = solve(problem), solve(problem)
    assert first.certificate.objective == pytest.approx(1.0)
    assert np.array_equal(first.placement.physical_to_logical, second.placement.physical_to_logical)
    assert first.placement.physical_to_logical.shape == identity(problem).physical_to_logical.shape
