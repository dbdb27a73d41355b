"""Incremental prices of swaps equal recomputation, for both executions, with and without replicas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.solvers.placement.balance import DeviceLoads, LayerLoads
from moecc.solvers.placement.search import same_device
from moecc.solvers.placement.start import balanced_start, replicate
from moecc.solvers.placement.traffic import HomeRows, MigrateRows, SwapTable


def layer(seed, *, kind, spare):
    rng = np.random.default_rng(seed)
    num_experts, devices, top_k, rows = 9, 3, 4, 40
    slots = num_experts + 3 * spare
    ids = np.argsort(rng.random((rows, num_experts)), axis=1)[:, :top_k]
    weight = rng.random(rows)
    loads = rng.random((2, num_experts))
    table = LayerLoads(
        loads=loads / loads.sum(axis=1, keepdims=True) * devices, shares=np.array([0.7, 0.3]), devices=devices
    )
    experts = replicate(table.loads[0], slots, devices)
    device_of = balanced_start(table, experts, slots // devices)
    if kind == "home":
        traffic = HomeRows(ids, weight, experts, devices)
    else:
        traffic = MigrateRows(ids, weight, experts, devices, rng.integers(0, devices, (rows, 2)))
    return rng, table, traffic, device_of


@pytest.mark.parametrize(
    ("kind", "spare", "exact"), [("home", 0, 1), ("home", 1, 0), ("migrate", 0, 1), ("migrate", 1, 1)]
)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_swap_prices_equal_recomputation(kind, spare, exact, seed):
    rng, table, rows, device_of = layer(seed, kind=kind, spare=spare)
    swaps, loads = SwapTable(rows, device_of), DeviceLoads(table, rows.experts, device_of)
    units = np.arange(len(device_of))
    for _ in range(6):
        allowed = np.argwhere(~same_device(rows.experts, device_of, units, 3))
        u, v = (int(x) for x in allowed[rng.integers(len(allowed))])
        change, before = swaps.changes()[u, v], swaps.cost
        imbalance = loads.after_swaps(units[:, None], units[None, :], device_of)
        loads.swap(u, v, int(device_of[u]), int(device_of[v]))
        device_of = device_of.copy()
        device_of[u], device_of[v] = device_of[v], device_of[u]
        swaps.swap(u, v)
        fresh = SwapTable(rows, device_of)
        assert swaps.cost == pytest.approx(fresh.cost, rel=1e-12)
        if exact:
            assert swaps.cost - before == pytest.approx(change, abs=1e-6)
        np.testing.assert_allclose(swaps.changes(), fresh.changes(), atol=1e-9)
        assert loads.imbalance == pytest.approx(imbalance[u, v], rel=1e-12)
        recomputed = DeviceLoads(table, rows.experts, device_of).imbalance
        assert loads.imbalance == pytest.approx(recomputed, rel=1e-12)


@settings(max_examples=60)
@given(st.data())
def test_a_start_is_always_a_placement(data):
    devices, num_experts = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    low = -(-num_experts // devices)
    width = data.draw(st.integers(low, num_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    loads = rng.random((1, num_experts)) ** 4
    table = LayerLoads(loads=loads / loads.sum() * devices, shares=np.ones(1), devices=devices)
    experts = replicate(table.loads[0], devices * width, devices)
    device_of = balanced_start(table, experts, width)
    assert (np.bincount(device_of, minlength=devices) == width).all()
    assert len(set(zip(experts.tolist(), device_of.tolist(), strict=True))) == devices * width
    assert set(experts.tolist()) == set(range(num_experts))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    tail=st.sampled_from([0.01, 0.1, 1 - 0.9, 0.3, 0.5, 1.0]),
    alike=st.booleans(),
)
def test_the_mean_of_the_tail_is_its_least_bound(seed, rows, tail, alike):
    # Rockafellar and Uryasev: CVaR is the least, over all thresholds, of threshold + mean excess / tail.
    rng = np.random.default_rng(seed)
    shares = np.full(rows, 1.0) if alike else rng.random(rows) + 0.1
    shares /= shares.sum()
    table = LayerLoads(loads=np.ones((rows, 2)), shares=shares, devices=2, rule="cvar", tail=tail)
    peaks = rng.random((rows, 3, 2)).round(1)
    excess = np.maximum(peaks[None] - peaks[:, None], 0.0)
    expected = (peaks + np.tensordot(excess, shares, ((1,), (0,))) / tail).min(axis=0)
    np.testing.assert_allclose(table.combine(peaks), expected, rtol=1e-12)
