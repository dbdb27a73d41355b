"""Workers give the answer of one process, in time, interrupted or not; caps hold on sequences nobody has seen."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import numpy as np
import pytest

from moecc.errors import MoeccError
from moecc.solvers.placement import PlacementProblem, evaluate_all, solve
from moecc.solvers.placement.home import search_home
from moecc.solvers.placement.layers import balance, begin
from moecc.solvers.placement.margin import solve_unseen
from moecc.solvers.placement.parallel import Team
from moecc.solvers.placement.search import Clock
from moecc.solvers.routing import Routing, assumed_routing


def problem_of(*, layers=3, tokens=300, experts=32, **options) -> PlacementProblem:
    routing = assumed_routing("zipf", layers=layers, experts=experts, top_k=4, tokens=tokens, alpha=0.5)
    return PlacementProblem(
        workloads=(routing,), devices=8, devices_per_node=4, slots_per_device=experts // 8, **options
    )


@pytest.mark.parametrize("objective", ["traffic", "load"])
def test_any_number_of_workers_gives_the_same_answer(objective):
    problems = [problem_of(objective=objective, max_imbalance=1.2, workers=workers) for workers in (1, 2)]
    one, two = (solve(problem) for problem in problems)
    assert one.certificate.status == two.certificate.status
    assert one.certificate.objective == two.certificate.objective
    assert np.array_equal(one.placement.physical_to_logical, two.placement.physical_to_logical)


def test_workers_keep_the_time_limit():
    problem = problem_of(layers=12, tokens=3000, experts=64, max_imbalance=1.3, time_limit_s=3, workers=2)
    started = time.monotonic()
    certificate = solve(problem).certificate
    assert certificate.status == "time_limit"
    # The half second is for a machine that is shared while tests run.
    assert time.monotonic() - started < 3 * 1.1 + 0.5


def test_an_interrupt_returns_the_workers_best():
    problem = problem_of(layers=12, tokens=3000, experts=64, max_imbalance=1.3, time_limit_s=60, workers=2)
    before = solve(PlacementProblem(**{**vars(problem), "time_limit_s": 0.01, "workers": 1}))
    reports = itertools.count()

    def interrupt(done: int, total: int) -> None:
        if done and next(reports) == 18:  # every layer was balanced, half of them searched
            raise KeyboardInterrupt

    solution = solve(problem, interrupt)
    assert next(reports) > 18
    assert solution.certificate.interrupted
    assert solution.certificate.objective < before.certificate.objective


def test_a_failing_worker_is_an_error_and_none_is_left():
    work = begin(problem_of(), Clock(deadline=time.monotonic() + 10), lambda done, total: None)
    with pytest.raises(MoeccError, match="unexpected keyword argument"), Team(2) as team:
        team.run(work, partial(balance, no_such_option=1))
    assert len(team.workers) == 2
    assert all(worker.process.poll() is not None for worker in team.workers)


def test_a_killed_worker_is_an_error():
    problem = problem_of(layers=12, tokens=3000, experts=64)
    work = begin(problem, Clock(deadline=time.monotonic() + 30), lambda done, total: None)
    with Team(2) as team:
        timer = threading.Timer(1.5, lambda: team.workers[0].process.kill())
        timer.start()
        with pytest.raises(MoeccError, match="worker process"):
            team.run(work, search_home)


def drifting(seed=0) -> Routing:
    """Sequences differ in the experts they like, so that a placement fits its own sequences best."""
    rng = np.random.default_rng(seed)
    ids = np.empty((40 * 16, 2, 4), np.int16)
    for sequence in range(40):
        taste = rng.normal(0, 1.0, (2, 32))
        keys = taste + rng.gumbel(size=(16, 2, 32))
        ids[sequence * 16 : sequence * 16 + 16] = np.argsort(-keys, axis=2)[:, :, :4]
    return Routing("drifting", ids, 32, np.repeat(np.arange(40, dtype=np.int32), 16))


def test_a_cap_for_unseen_sequences_is_tightened_by_the_gap_seen():
    whole = drifting()
    train, held_out = whole.split(1)
    problem = PlacementProblem(
        workloads=(train,),
        devices=4,
        devices_per_node=4,
        slots_per_device=8,
        max_imbalance=1.11,
        time_limit_s=20,
    )
    plain, solution = solve(problem), solve_unseen(problem)
    margin = solution.certificate.margin
    assert plain.certificate.margin is None
    assert margin is not None
    assert margin.asked == 1.11
    assert margin.gap > 0.02
    assert margin.cap == pytest.approx(1.11 - margin.gap)
    seen = evaluate_all(solution.placement, [train], "home").mean.imbalance
    assert seen <= margin.cap + 1e-9
    assert margin.expected == pytest.approx(seen + margin.gap)
    assert evaluate_all(solution.placement, [held_out], "home").mean.imbalance <= 1.11


def test_without_a_cap_there_is_no_margin():
    problem = problem_of(time_limit_s=5)
    solution = solve_unseen(problem)
    assert solution.certificate.margin is None
    assert np.array_equal(
        solution.placement.physical_to_logical, solve(problem).placement.physical_to_logical
    )


def test_an_interrupted_trial_is_handed_in():
    def interrupt(done, total):
        raise KeyboardInterrupt

    certificate = solve_unseen(problem_of(max_imbalance=1.3), interrupt).certificate
    assert certificate.interrupted
    assert certificate.margin is not None
