"""Predicted layer time: swap prices against recomputation, the optimum against brute force, the charge of copies by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.solvers.placement import PlacementProblem, identity, solve
from moecc.solvers.placement.balance import layer_loads
from moecc.solvers.placement.check_step import step_us
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.start import balanced_start, replicate
from moecc.solvers.placement.step import StepSwaps, rates, step_rows
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing, assumed_routing


def routing(rng, *, tokens, experts, top_k, layers=1, name="a", weight=1.0):
    keys = rng.random((tokens, layers, experts)) * rng.uniform(0.2, 1.0, experts)
    ids = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int16)
    return Routing(name, ids, experts, np.arange(tokens, dtype=np.int32), weight)


def cost_of(rng):
    return StepCost(
        compute_us_per_row=float(rng.uniform(0, 0.2)),
        fixed_us=float(rng.uniform(0, 9)),
        tokens=100,
        bytes_per_token=1000.0,
        us_per_byte_by_tier=(0.0, float(rng.uniform(0, 2e-3)), float(rng.uniform(0, 5e-3))),
    )


def problem_of(rng, *, experts, devices, width, per_node, count=2, layers=1, tokens=20, **options):
    workloads = [
        routing(rng, tokens=tokens + i, experts=experts, top_k=2, layers=layers, name=str(i), weight=1 + i)
        for i in range(count)
    ]
    given = {"objective": "step", "step_cost": cost_of(rng)} | options
    return PlacementProblem(
        workloads=tuple(workloads),
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=width,
        **given,
    )


def slowest_by_hand(problem, layer, index=0):
    """Every token from every home, copy by copy. layer: a tuple of the experts of each device."""
    cost, size, per_node = problem.step_cost, problem.devices, problem.devices_per_node
    copies = np.array([sum(e in held for held in layer) for e in range(problem.num_experts)])
    times = []
    for w in problem.workloads:
        device_us = np.zeros(size)
        for token in w.topk_ids[:, index].tolist():
            for e in token:
                for d in (d for d, held in enumerate(layer) if e in held):
                    device_us[d] += cost.compute_us_per_row / copies[e]
            open_, used = set(token), []
            while open_:
                used.append(max(range(size), key=lambda d: (len(open_ & set(layer[d])), -d)))
                open_ -= set(layer[used[-1]])
            for home in range(size):
                arrived = {home}
                for d in used:
                    relay = d // per_node * per_node + home % per_node
                    hops = [(home, d)] if home // per_node == d // per_node else [(home, relay), (relay, d)]
                    for a, b in hops:
                        if b in arrived:
                            continue
                        arrived.add(b)
                        tier = 1 if a // per_node == b // per_node else 2
                        device_us[b] += cost.bytes_per_token * cost.us_per_byte_by_tier[tier] / size
        times.append(device_us * cost.tokens / len(w.topk_ids))
    if problem.balance == "pooled":
        return cost.fixed_us + (problem.shares @ np.array(times)).max()
    peaks = np.array(times).max(axis=1)
    return cost.fixed_us + (peaks.max() if problem.balance == "worst" else problem.shares @ peaks)


def as_placement(problem, layers):
    return Placement(
        physical_to_logical=np.array([list(itertools.chain(*layer)) for layer in layers], np.int32),
        devices=problem.devices,
        devices_per_node=problem.devices_per_node,
        slots_per_device=problem.slots_per_device,
        num_experts=problem.num_experts,
    )


def every_layer(experts, devices, width):
    sets = list(itertools.combinations(range(experts), width))
    if devices * width > experts:
        return [
            o for o in itertools.product(sets, repeat=devices) if len(set(itertools.chain(*o))) == experts
        ]
    return (
        [o for o in itertools.product(sets, repeat=devices) if len(set(itertools.chain(*o))) == experts]
        if len(sets) ** devices < 10**5
        else list(disjoint(sets, devices, frozenset()))
    )


def disjoint(sets, devices, used):
    if not devices:
        yield ()
        return
    for held in sets:
        if used.isdisjoint(held):
            for rest in disjoint(sets, devices - 1, used | set(held)):
                yield (held, *rest)


BALANCES = ["pooled", "workload", "worst"]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(BALANCES), st.sampled_from([1, 2, 4]))
def test_the_checker_counts_copies_as_by_hand(seed, balance, per_node):
    rng = np.random.default_rng(seed)
    width = int(rng.integers(2, 4))
    problem = problem_of(rng, experts=8, devices=4, width=width, per_node=per_node, balance=balance)
    sets = [sorted(rng.permutation(8)[:width].tolist()) for _ in range(4)]
    for e in set(range(8)) - set(itertools.chain(*sets)):
        counts = np.bincount(list(itertools.chain(*sets)), minlength=8)
        d, i = next(
            (d, i) for d in range(4) for i, x in enumerate(sets[d]) if counts[x] > 1 and e not in sets[d]
        )
        sets[d][i] = e
    placement = as_placement(problem, [sets])
    assert step_us(placement, problem) == pytest.approx(slowest_by_hand(problem, sets), rel=1e-12)


SHAPES = [(4, 2, 2, 1), (6, 3, 2, 3), (6, 2, 3, 2), (8, 4, 2, 2), (8, 2, 4, 1), (5, 3, 2, 3), (4, 2, 3, 2)]
"""(experts, devices, slots per device, devices per node); the last two have spare slots."""


@settings(max_examples=20)
@given(st.data())
def test_step_equals_brute_force(data):
    experts, devices, width, per_node = data.draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    problem = problem_of(
        rng,
        experts=experts,
        devices=devices,
        width=width,
        per_node=per_node,
        layers=2,
        count=data.draw(st.integers(1, 2)),
        balance=data.draw(st.sampled_from(BALANCES)),
    )
    options = every_layer(experts, devices, width)
    single = [
        PlacementProblem(
            **{
                f: getattr(problem, f)
                for f in ("devices", "devices_per_node", "slots_per_device", "objective")
            },
            balance=problem.balance,
            step_cost=problem.step_cost,
            workloads=tuple(
                Routing(w.name, w.topk_ids[:, [i]], experts, w.sequence_ids, w.weight)
                for w in problem.workloads
            ),
        )
        for i in range(2)
    ]
    # The checker was held to a count by hand above.
    best = np.mean([min(step_us(as_placement(one, [o]), one) for o in options) for one in single])
    certificate = solve(problem).certificate
    assert certificate.objective == pytest.approx(best, rel=1e-9)
    assert certificate.status == "optimal"


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(("spare", "per_node"), [(0, 4), (0, 2), (1, 2)])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_swap_prices_equal_recomputation(balance, spare, per_node, seed):
    rng = np.random.default_rng(seed)
    problem = problem_of(
        rng, experts=12, devices=4, width=3 + spare, per_node=per_node, balance=balance, tokens=40
    )
    table, rate = layer_loads(problem)[0], rates(problem)
    experts = replicate(table.shares @ table.loads, problem.slots, 4)
    at = balanced_start(table, experts, problem.slots_per_device)
    rows = step_rows(problem, 0, experts)
    swaps = StepSwaps(rows, table, rate, at)
    for _ in range(5):
        while True:
            u, v = rng.integers(0, len(at), 2)
            held = set(zip(experts.tolist(), at.tolist(), strict=True))
            if at[u] != at[v] and not {(experts[u], at[v]), (experts[v], at[u])} & held:
                break
        before, change = swaps.cost, swaps.changes()[u, v]
        squares = (swaps.times**2).sum(axis=1)
        mean = swaps.times.mean()
        at = at.copy()
        at[u], at[v] = at[v], at[u]
        swaps.swap(int(u), int(v))
        fresh = StepSwaps(rows, table, rate, at)
        assert swaps.cost == pytest.approx(fresh.cost, rel=1e-10)
        np.testing.assert_allclose(swaps.changes(), fresh.changes(), atol=1e-8)
        one_node = per_node == 4
        if not spare and one_node:
            even = table.shares @ ((swaps.times**2).sum(axis=1) - squares) / mean
            assert change == pytest.approx(swaps.cost - before + 0.01 * even, abs=1e-8)
        elif not spare:
            exact = StepSwaps(rows, table, rate, at).cost - before
            here = [int(x) for x in (at[u], at[v])]
            moved = (fresh.times[:, here] ** 2).sum(axis=1)
            assert np.isfinite(moved).all()
            assert change - exact < 0.02 * (fresh.times.max() ** 2) * 4 / mean
    written = as_placement(problem, [[sorted(experts[at == d].tolist()) for d in range(4)]])
    assert rate.fixed + fresh.cost == pytest.approx(step_us(written, problem), rel=1e-9)


def test_a_measured_matrix_is_priced_as_the_checker_does():
    rng = np.random.default_rng(3)
    matrix = rng.uniform(1e-4, 3e-3, (4, 4)) * (1 - np.eye(4))
    cost = StepCost(compute_us_per_row=0.05, fixed_us=1.0, tokens=64, bytes_per_token=500.0)
    problem = problem_of(
        rng,
        experts=8,
        devices=4,
        width=2,
        per_node=2,
        layers=2,
        step_cost=cost,
        links=Links.from_matrix(matrix, 2),
    )
    solution = solve(problem)
    assert solution.certificate.status == "optimal"
    assert solution.certificate.objective <= step_us(identity(problem), problem)


def test_search_beats_identity_and_bounds_hold_without_a_proof():
    workloads = (assumed_routing("zipf", layers=2, experts=32, top_k=4, tokens=300, alpha=0.6),)
    problem = PlacementProblem(
        workloads=workloads,
        devices=8,
        devices_per_node=4,
        slots_per_device=4,
        objective="step",
        step_cost=cost_of(np.random.default_rng(0)),
    )
    first, second = solve(problem), solve(problem)
    assert first.certificate.bound is not None
    assert first.certificate.bound <= first.certificate.objective < step_us(identity(problem), problem)
    assert np.array_equal(first.placement.physical_to_logical, second.placement.physical_to_logical)


def test_step_problems_that_lack_something_are_refused():
    rng = np.random.default_rng(0)
    for options, message in (
        ({"step_cost": None}, "objective 'step' has no cost of a step"),
        ({"execution": "migrate"}, "objective 'step' has no execution 'migrate'"),
        ({"balance": "cvar"}, "objective 'step' has no balance 'cvar'"),
        ({"links": Links.by_node(2, 2)}, "links join 2 devices, the cluster has 4"),
    ):
        with pytest.raises(InputError, match=message):
            problem_of(rng, experts=8, devices=4, width=2, per_node=2, **options)
    with pytest.raises(InputError, match="tokens is 0"):
        StepCost(compute_us_per_row=1.0, fixed_us=0.0, tokens=0, bytes_per_token=1.0)
