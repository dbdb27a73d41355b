"""From a placement in force to another: the best within a budget against brute force, plans that can be carried out."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.solvers.placement import Placement, PlacementProblem, evaluate_all, identity, solve
from moecc.solvers.placement.carry import best_assignment, match_devices
from moecc.solvers.placement.check import moved_experts, objective_of
from moecc.solvers.placement.moves import plan_moves
from moecc.solvers.placement.within import Point, split_budget
from moecc.solvers.routing import Routing


def routing(rng, *, tokens, layers, experts, top_k, name="a"):
    keys = rng.random((tokens, layers, experts)) * rng.uniform(0.2, 1.0, (layers, experts))
    ids = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int16)
    return Routing(name, ids, experts, np.arange(tokens, dtype=np.int32))


def random_placement(rng, *, layers, experts, devices, width, per_node=1) -> Placement:
    rows = []
    for _ in range(layers):
        order = rng.permutation(experts)
        held = order[np.arange(devices * width) % experts].reshape(devices, width)
        rows.append(held[rng.permutation(devices)].ravel())
    return Placement(
        physical_to_logical=np.array(rows, np.int32),
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=width,
        num_experts=experts,
    )


def held(placement):
    shape = (placement.layers, placement.devices, placement.slots_per_device)
    return [[set(d) for d in row] for row in placement.physical_to_logical.reshape(shape).tolist()]


def every_layer(experts, devices, width):
    sets = [frozenset(c) for c in itertools.combinations(range(experts), width)]
    return [o for o in itertools.product(sets, repeat=devices) if len(frozenset().union(*o)) == experts]


def best_within(problem, budget):
    """The best objective over all placements that move at most `budget` experts; None if none meets the cap."""
    before, best = held(problem.in_force), None
    layers = every_layer(problem.num_experts, problem.devices, problem.slots_per_device)
    options = [
        [(sum(len(set(n) - o) for n, o in zip(new, old, strict=True)), new) for new in layers]
        for old in before
    ]
    for chosen in itertools.product(*options):
        if sum(moves for moves, _ in chosen) > budget:
            continue
        rows = [[e for d in new for e in sorted(d)] for _, new in chosen]
        placement = dataclasses.replace(identity(problem), physical_to_logical=np.array(rows, np.int32))
        evaluation = evaluate_all(placement, problem.workloads, problem.execution)
        if (
            problem.max_imbalance is not None
            and evaluation.imbalance(problem.balance) > problem.max_imbalance + 1e-9
        ):
            continue
        value = objective_of(placement, problem, evaluation)
        best = value if best is None else min(best, value)
    return best


CASES = st.sampled_from(
    [
        # execution, objective, experts, devices, width, layers, cap
        ("home", "load", 6, 3, 2, 1, None),
        ("home", "load", 4, 2, 2, 2, None),
        ("home", "load", 4, 2, 3, 2, None),
        ("home", "traffic", 6, 3, 2, 1, None),
        ("home", "traffic", 4, 2, 2, 3, None),
        ("home", "traffic", 4, 2, 2, 2, 1.25),
        ("migrate", "traffic", 4, 2, 2, 3, None),
        ("migrate", "load", 4, 2, 2, 2, None),
    ]
)


@settings(max_examples=16)
@given(case=CASES, budget=st.integers(0, 6), seed=st.integers(0, 2**16))
def test_small_cases_are_the_best_within_the_budget(case, budget, seed) -> None:
    execution, objective, experts, devices, width, layers, cap = case
    rng = np.random.default_rng(seed)
    problem = PlacementProblem(
        workloads=tuple(
            routing(rng, tokens=24, layers=layers, experts=experts, top_k=2, name=name) for name in "ab"
        ),
        devices=devices,
        devices_per_node=devices,
        slots_per_device=width,
        execution=execution,
        objective=objective,
        max_imbalance=cap,
        in_force=random_placement(rng, layers=layers, experts=experts, devices=devices, width=width),
        max_moved_bytes=10.0 * budget + 9,
        expert_bytes=10,
    )
    solution = solve(problem)
    assert problem.in_force is not None
    moved = moved_experts(problem.in_force, solution.placement)
    assert moved <= budget
    assert moved == len(plan_moves(problem.in_force, solution.placement, 10).moves)
    best = best_within(problem, budget)
    if best is None:
        assert solution.certificate.status == "infeasible"
    else:
        assert solution.certificate.objective == pytest.approx(best, abs=1e-9)
        assert solution.certificate.bound is None or solution.certificate.bound <= best + 1e-9


def larger(rng, **changes):
    workload = routing(rng, tokens=400, layers=4, experts=32, top_k=4)
    settings_ = {"workloads": (workload,), "devices": 8, "devices_per_node": 4, "slots_per_device": 5}
    return PlacementProblem(**(settings_ | {"objective": "load", "time_limit_s": 20.0} | changes))


def test_a_larger_budget_is_never_worse_and_the_same_seed_gives_the_same() -> None:
    old = random_placement(np.random.default_rng(1), layers=4, experts=32, devices=8, width=5, per_node=4)
    values = []
    for budget in (0, 4, 12, 40, 160):
        problem = larger(
            np.random.default_rng(0), in_force=old, max_moved_bytes=float(budget), expert_bytes=1
        )
        solution = solve(problem)
        assert moved_experts(old, solution.placement) <= budget
        values.append(solution.certificate.objective)
        if budget == 12:
            again = solve(problem).placement.physical_to_logical
            np.testing.assert_array_equal(again, solution.placement.physical_to_logical)
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(evaluate_all(old, problem.workloads, "home").mean.imbalance)
    assert values[2] < 0.5 * (values[0] + values[-1])
    # Free to move, replicas included, it comes close to a search that has no past.
    assert values[-1] <= solve(larger(np.random.default_rng(0))).certificate.objective + 0.01


def test_without_a_budget_only_names_change() -> None:
    old = random_placement(np.random.default_rng(1), layers=4, experts=32, devices=8, width=5, per_node=4)
    free = solve(larger(np.random.default_rng(0)))
    named = solve(larger(np.random.default_rng(0), in_force=old))
    assert named.certificate.objective == pytest.approx(free.certificate.objective, abs=1e-12)
    assert moved_experts(old, named.placement) < moved_experts(old, free.placement)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), per_node=st.sampled_from([1, 2, 4]))
def test_a_renamed_placement_moves_nothing(seed, per_node) -> None:
    rng = np.random.default_rng(seed)
    shape = {"layers": 3, "experts": 12, "devices": 4, "width": 3, "per_node": per_node}
    old, other = random_placement(rng, **shape), random_placement(rng, **shape)
    problem = PlacementProblem(
        workloads=(routing(rng, tokens=20, layers=3, experts=12, top_k=2),),
        devices=4,
        devices_per_node=per_node,
        slots_per_device=3,
    )
    nodes, rows = 4 // per_node, []
    for row in old.physical_to_logical.reshape(3, nodes, per_node, 3):
        rows.append(
            np.stack([node[rng.permutation(per_node)] for node in row[rng.permutation(nodes)]]).ravel()
        )
    renamed = dataclasses.replace(old, physical_to_logical=np.array(rows, np.int32))
    assert moved_experts(old, match_devices(problem, old, renamed)) == 0
    matched = match_devices(problem, old, other)
    assert moved_experts(old, matched) <= moved_experts(old, other)
    before = evaluate_all(other, problem.workloads, "home").mean
    after = evaluate_all(matched, problem.workloads, "home").mean
    for figure in ("imbalance", "fan_out", "node_fan_out"):
        assert getattr(after, figure) == pytest.approx(getattr(before, figure))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 5))
def test_assignments_are_the_best(seed, size) -> None:
    gains = np.random.default_rng(seed).integers(0, 5, (size, size))
    found = gains[np.arange(size), best_assignment(gains)].sum()
    assert found == max(gains[np.arange(size), list(p)].sum() for p in itertools.permutations(range(size)))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    shapes=st.sampled_from(
        [((4, 3), (4, 3)), ((2, 5), (4, 3)), ((4, 3), (2, 5)), ((4, 3), (4, 4)), ((1, 10), (5, 2))]
    ),
)
def test_plans_can_be_carried_out(seed, shapes) -> None:
    rng = np.random.default_rng(seed)
    (old_devices, old_width), (new_devices, new_width) = shapes
    old = random_placement(rng, layers=3, experts=10, devices=old_devices, width=old_width)
    new = random_placement(rng, layers=3, experts=10, devices=new_devices, width=new_width)
    plan = plan_moves(old, new, 7)
    holds = [row + [set() for _ in range(new_devices - old_devices)] for row in held(old)]
    first = [[set(d) for d in row] for row in holds]
    begin = 0
    for count in plan.rounds:
        batch = plan.moves[begin : begin + count]
        begin += count
        assert len({m.source for m in batch}) == len({m.target for m in batch}) == len(batch) > 0
        for move in batch:
            assert move.expert in first[move.layer][move.source]
            assert move.expert not in holds[move.layer][move.target]
            holds[move.layer][move.target].add(move.expert)
    assert begin == len(plan.moves) == moved_experts(old, new)
    for layer, row in enumerate(held(new)):
        for device, experts in enumerate(row):
            assert experts <= holds[layer][device]
    assert plan.moved_bytes == 7 * len(plan.moves)
    busiest = (
        [np.bincount([getattr(m, side) for m in plan.moves]).max() for side in ("source", "target")]
        if plan.moves
        else [0]
    )
    assert len(plan.rounds) == max(busiest)
    assert 0 <= plan.peak_extra_bytes <= 7 * len(plan.moves)


@pytest.mark.parametrize(("devices", "width"), [(16, 2), (4, 8), (8, 5), (6, 6)])
def test_elastic_moves_only_what_it_must(devices, width) -> None:
    rng = np.random.default_rng(3)
    old = random_placement(rng, layers=4, experts=32, devices=8, width=4)
    need = 4 * sum(max(0, width - (4 if d < 8 else 0)) for d in range(devices))
    changes = {"devices": devices, "devices_per_node": 1, "slots_per_device": width, "in_force": old}
    problem = larger(rng, **changes, max_moved_bytes=3.0 * need, expert_bytes=3)
    solution = solve(problem)
    assert len(plan_moves(old, solution.placement, 3).moves) <= need
    if need:
        with pytest.raises(InputError, match=f"take {3 * need} moved bytes"):
            solve(dataclasses.replace(problem, max_moved_bytes=3.0 * need - 1))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_moved_bytes": 5.0}, "max_moved_bytes without a placement in force"),
        ({"in_force": 4, "max_moved_bytes": 5.0}, "max_moved_bytes without expert_bytes"),
        (
            {"in_force": 4, "max_moved_bytes": -1.0, "expert_bytes": 1},
            "max_moved_bytes -1.0 is not a number of bytes",
        ),
        ({"in_force": 4, "max_moved_bytes": float("nan"), "expert_bytes": 1}, "is not a number of bytes"),
        ({"expert_bytes": -1}, "expert_bytes -1 is negative"),
        ({"in_force": 3}, "the placement in force has layers 3, the traces 4"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, error) -> None:
    rng = np.random.default_rng(0)
    if "in_force" in changes:
        layers = changes["in_force"]
        changes = changes | {"in_force": random_placement(rng, layers=layers, experts=32, devices=8, width=5)}
    with pytest.raises(InputError, match=error):
        larger(rng, **changes)


@settings(max_examples=40)
@given(data=st.data())
def test_the_budget_is_split_best(data) -> None:
    none = np.zeros(0, np.int64)
    frontiers = [
        {
            moves: Point(score=float(score), experts=none, device_of=none)
            for moves, score in data.draw(
                st.dictionaries(st.integers(0, 5), st.integers(0, 9), min_size=1)
            ).items()
        }
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    least = sum(min(f) for f in frontiers)
    budget = least + data.draw(st.integers(0, 8))
    found = sum(point.score for point in split_budget(frontiers, budget))
    options = itertools.product(*(f.items() for f in frontiers))
    assert found == min(sum(p.score for _, p in o) for o in options if sum(m for m, _ in o) <= budget)
