"""Schedules against all orders by brute force; the checker against schedules that are broken on purpose."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError, MoeccError
from moecc.solvers.schedule import (
    ScheduleProblem,
    Task,
    best_split,
    check_schedule,
    lower_bound_us,
    schedule_json,
    serial_makespan,
    solve,
    solve_schedule,
)


def shortest_by_brute_force(problem: ScheduleProblem) -> float:
    """The least makespan over every order of the tasks, each started as early as its order allows."""
    best = math.inf
    for order in permutations(problem.tasks):
        ends: dict[str, float] = {}
        free: dict[str, float] = {}
        for task in order:
            if any(name not in ends for name in task.after):
                break
            start = max([free.get(task.stream, 0.0), *(ends[name] for name in task.after)])
            ends[task.name] = free[task.stream] = start + task.duration_us
        else:
            best = min(best, max(ends.values(), default=0.0))
    return best


@st.composite
def problems(draw: st.DrawFn) -> ScheduleProblem:
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 6))):
        before = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        tasks.append(
            Task(
                name=f"t{number}",
                stream=draw(st.sampled_from(["compute", "intra", "inter"])),
                duration_us=draw(st.one_of(st.just(0.0), st.floats(0.0, 50.0))),
                after=tuple(f"t{other}" for other in sorted(before)),
                chunk=draw(st.integers(0, 1)),
            )
        )
    return ScheduleProblem(tasks=tuple(tasks))


def random_problem(seed: int, streams: int = 2, tasks: int = 6) -> ScheduleProblem:
    rng = np.random.default_rng(seed)
    return ScheduleProblem(
        tasks=tuple(
            Task(
                name=f"t{number}",
                stream=f"s{rng.integers(streams)}",
                duration_us=float(rng.uniform(1, 30)),
                after=tuple(f"t{other}" for other in range(number) if rng.random() < 0.3),
            )
            for number in range(tasks)
        )
    )


@given(problem=problems())
@settings(max_examples=60)
def test_equals_brute_force(problem: ScheduleProblem) -> None:
    schedule = solve_schedule(problem)
    check_schedule(problem, schedule)
    shortest = shortest_by_brute_force(problem)
    assert schedule.status == "optimal"
    assert schedule.makespan_us == pytest.approx(shortest, abs=solve.TICK_US * len(problem.tasks))
    assert schedule.bound_us <= shortest + 1e-6
    assert lower_bound_us(problem) <= shortest + 1e-6 <= serial_makespan(problem) + 2e-6


def test_solver_beats_the_list_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of these problems need the exact solver, whatever list scheduling finds."""
    calls = []
    inner = solve._cp_sat

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return inner(*arguments)

    monkeypatch.setattr(solve, "_cp_sat", spy)
    for seed in range(60):
        problem = random_problem(seed)
        schedule = solve_schedule(problem)
        check_schedule(problem, schedule)
        assert schedule.makespan_us == pytest.approx(shortest_by_brute_force(problem), abs=0.01)
        assert schedule.gap < 1e-3
    assert len(calls) >= 3


def chunked(chunks: int, layers: int = 2, cost: float = 1.0) -> ScheduleProblem:
    """Layers of attention, dispatch, experts and combine; dispatch and combine share a network."""
    tasks = []
    for chunk in range(chunks):
        before: tuple[str, ...] = ()
        for layer in range(layers):
            for name, stream, duration in (
                ("attention", "compute", 40.0),
                ("dispatch", "network", 30.0),
                ("experts", "compute", 35.0),
                ("combine", "network", 55.0),
            ):
                full = f"L{layer}.{name}.{chunk}"
                tasks.append(
                    Task(
                        name=full,
                        stream=stream,
                        duration_us=duration * cost / chunks,
                        after=before,
                        chunk=chunk,
                    )
                )
                before = (full,)
    return ScheduleProblem(tasks=tuple(tasks))


def test_interchangeable_chunks_keep_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of three tasks each: ordering the chunks by number must not lose the best schedule.

    Without the simple bound every problem goes to CP-SAT, whose bound would rise above the optimum.
    """
    monkeypatch.setattr(solve, "lower_bound_us", lambda problem: 0.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        durations = rng.uniform(1, 20, size=3)
        streams = [f"s{rng.integers(2)}" for _ in range(3)]
        tasks = tuple(
            Task(
                name=f"t{place}.{chunk}",
                stream=streams[place],
                duration_us=float(durations[place]),
                after=(f"t{place - 1}.{chunk}",) if place else (),
                chunk=chunk,
            )
            for chunk in range(2)
            for place in range(3)
        )
        problem = ScheduleProblem(tasks=tasks)
        schedule = solve_schedule(problem)
        check_schedule(problem, schedule)
        shortest = shortest_by_brute_force(problem)
        assert schedule.makespan_us == pytest.approx(shortest, abs=0.01)
        assert shortest - 0.01 <= schedule.bound_us <= shortest + 1e-6


def test_same_seed_same_schedule() -> None:
    assert solve_schedule(chunked(3), seed=1) == solve_schedule(chunked(3), seed=1)


def test_no_time_falls_back_and_says_so() -> None:
    problem = next(
        p for p in map(random_problem, range(100)) if solve_schedule(p).makespan_us > lower_bound_us(p) + 1
    )
    schedule = solve_schedule(problem, time_limit_s=0.0)
    check_schedule(problem, schedule)
    assert schedule.status in ("heuristic", "feasible")
    assert schedule.bound_us >= lower_bound_us(problem)


def test_nothing_to_do() -> None:
    schedule = solve_schedule(ScheduleProblem(tasks=()))
    assert (schedule.makespan_us, schedule.gap, schedule.status) == (0.0, 0.0, "optimal")


def wait(name: str, *after: str, duration: float = 1.0) -> Task:
    return Task(name=name, stream="s", duration_us=duration, after=after)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((wait("a"), wait("a")), "two tasks are named 'a'"),
        ((wait("a", "b"),), "waits for 'b', which does not exist"),
        ((wait("a", "b"), wait("b", "a"), wait("c")), "in a cycle, or behind one: a, b"),
        ((wait("a", duration=-1.0),), "task 'a' lasts -1.0 us"),
        ((wait("a", duration=math.nan),), "task 'a' lasts nan us"),
    ],
)
def test_wrong_problems_are_refused(tasks: tuple[Task, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleProblem(tasks=tasks)


PROBLEM = ScheduleProblem(
    tasks=(
        Task(name="a", stream="compute", duration_us=10.0),
        Task(name="b", stream="network", duration_us=5.0, after=("a",)),
        Task(name="c", stream="compute", duration_us=4.0),
    )
)


@pytest.mark.parametrize(
    ("starts", "change", "message"),
    [
        ({"b": 9.0}, {}, "'b' starts before 'a' ends"),
        ({"c": 9.0}, {}, "'a' and 'c' overlap on stream 'compute'"),
        ({"a": -1.0}, {}, "'a' starts at -1.0 us"),
        ({"a": math.nan}, {}, "'a' starts at nan us"),
        ({"d": 1.0}, {}, "differ in tasks: d"),
        ({"c": None}, {}, "differ in tasks: c"),
        ({}, {"makespan_us": 14.0}, "makespan is 14.0 us, but the last task ends at 15.0 us"),
        ({}, {"bound_us": 16.0}, "bound 16.0 us exceeds"),
        ({}, {"order": {"compute": ("a", "c")}}, "every task exactly once"),
        ({}, {"order": {"compute": ("a", "c", "c"), "network": ("b",)}}, "every task exactly once"),
        ({}, {"order": {"compute": ("a", "b", "c"), "network": ()}}, "'b' is listed on stream 'compute'"),
        ({}, {"order": {"compute": ("c", "a"), "network": ("b",)}}, "'c' and 'a' overlap"),
    ],
)
def test_checker_rejects(starts: dict[str, float | None], change: dict[str, Any], message: str) -> None:
    good = solve_schedule(PROBLEM)
    check_schedule(PROBLEM, good)
    changed = {name: start for name, start in {**good.starts_us, **starts}.items() if start is not None}
    with pytest.raises(MoeccError, match=message):
        check_schedule(PROBLEM, replace(good, starts_us=changed, **change))


def test_split_gains_where_communication_can_hide() -> None:
    decision = best_split({chunks: chunked(chunks) for chunks in (1, 2, 4)})
    assert decision.chunks == 4
    assert decision.serial_us == decision.schedules[1].makespan_us == 320.0
    assert (
        decision.schedules[1].makespan_us > decision.schedules[2].makespan_us > decision.schedule.makespan_us
    )
    assert decision.bound_us <= decision.schedule.makespan_us


def test_split_is_refused_where_it_costs_more_than_it_hides() -> None:
    """Halving the tokens need not halve the time: with 1.8x the work in all, one chunk stays best."""
    decision = best_split({1: chunked(1), 2: chunked(2, cost=1.8)})
    assert decision.chunks == 1


def test_ties_go_to_fewer_chunks() -> None:
    one = ScheduleProblem(tasks=(wait("a", duration=10.0),))
    two = ScheduleProblem(tasks=(wait("a", duration=5.0), wait("b", "a", duration=5.0)))
    assert best_split({2: two, 1: one}).chunks == 1
    with pytest.raises(InputError):
        best_split({})


def test_schedule_json_carries_the_certificate() -> None:
    candidates = {chunks: chunked(chunks) for chunks in (1, 2)}
    decision = best_split(candidates)
    data = json.loads(json.dumps(schedule_json(candidates[2], decision.schedule, decision=decision)))
    assert data["schema"] == "moecc.schedule/1"
    assert data["certificate"]["bound_us"] <= data["makespan_us"] < data["serial_us"]
    assert data["split"]["candidates"]["1"]["makespan_us"] == data["split"]["unsplit_serial_us"]
    starts = [task["start_us"] for task in data["tasks"]]
    assert starts == sorted(starts)
    assert len(starts) == 16
    assert "split" not in schedule_json(candidates[2], decision.schedule)
