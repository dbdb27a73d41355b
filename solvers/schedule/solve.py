"""The shortest schedule: list scheduling where it meets the bound, CP-SAT otherwise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

from moecc.errors import MoeccError
from moecc.solvers.schedule.problem import (
    Schedule,
    ScheduleProblem,
    Task,
    heads_and_tails,
    lower_bound_us,
    topological_order,
)

TICK_US = 0.001  # CP-SAT counts time in whole ticks; 1 ns is far below what any latency model resolves
_PROVEN = 1e-9  # relative distance from the bound at which only float rounding is left


def solve_schedule(problem: ScheduleProblem, *, time_limit_s: float = 10.0, seed: int = 0) -> Schedule:
    """A schedule of the least makespan, with a proven lower bound.

    The same problem and seed give the same schedule, unless the time limit (wall clock) cuts the search short.
    Durations are rounded up to ticks for the search; afterwards the tasks start as early as the order found
    allows by their true durations, and the bound is lowered by all that the rounding had added.
    """
    listed = _start_in_order(problem, _list_schedule(problem))
    makespan, bound = _end(problem, listed), lower_bound_us(problem)
    if makespan <= bound * (1 + _PROVEN):
        return _schedule(problem, listed, bound, "optimal")
    found, proven, status = _cp_sat(problem, listed, time_limit_s, seed)
    bound = max(bound, proven)
    if found is None:
        return _schedule(problem, listed, bound, "heuristic")
    # The true durations can favour the list by less than the ticks resolve.
    starts = min(_start_in_order(problem, found), listed, key=lambda starts: _end(problem, starts))
    return _schedule(problem, starts, bound, status)


def _list_schedule(problem: ScheduleProblem) -> list[Task]:
    """Of the tasks that can start soonest, always the one with the longest chain behind it (Graham 1966)."""
    _, tails = heads_and_tails(problem)
    ends: dict[str, float] = {}
    free = dict.fromkeys(problem.streams, 0.0)
    left = list(problem.tasks)
    order: list[Task] = []
    while left:
        ready = [task for task in left if all(name in ends for name in task.after)]
        soonest = {t.name: max([free[t.stream], *(ends[name] for name in t.after)]) for t in ready}
        chosen = min(ready, key=lambda t: (soonest[t.name], -t.duration_us - tails[t.name]))
        ends[chosen.name] = free[chosen.stream] = soonest[chosen.name] + chosen.duration_us
        left.remove(chosen)
        order.append(chosen)
    return order


def _start_in_order(problem: ScheduleProblem, order: list[Task]) -> dict[str, float]:
    """The earliest starts that keep the order of the tasks on each stream; `order` is also topological."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    free = dict.fromkeys(problem.streams, 0.0)
    for task in order:
        starts[task.name] = max([free[task.stream], *(ends[name] for name in task.after)])
        ends[task.name] = free[task.stream] = starts[task.name] + task.duration_us
    return starts


def _end(problem: ScheduleProblem, starts: Mapping[str, float]) -> float:
    return max((starts[task.name] + task.duration_us for task in problem.tasks), default=0.0)


def _schedule(problem: ScheduleProblem, starts: dict[str, float], bound: float, status: str) -> Schedule:
    makespan = _end(problem, starts)
    by_start = sorted(topological_order(problem.tasks), key=lambda t: (starts[t.name], t.duration_us > 0))
    return Schedule(
        starts_us=starts,
        makespan_us=makespan,
        bound_us=makespan if makespan < bound <= makespan * (1 + _PROVEN) else bound,
        status=status,
        order={s: tuple(task.name for task in by_start if task.stream == s) for s in problem.streams},
    )


def _cp_sat(
    problem: ScheduleProblem, hint: Mapping[str, float], time_limit_s: float, seed: int
) -> tuple[list[Task] | None, float, str]:
    """The tasks in the order of their starts (None if nothing was found), a lower bound in us, the status."""
    from ortools.sat.python import cp_model

    ticks = {task.name: math.ceil(task.duration_us / TICK_US - 1e-9) for task in problem.tasks}
    rounding_us = math.fsum(max(0.0, ticks[t.name] * TICK_US - t.duration_us) for t in problem.tasks)
    horizon = sum(ticks.values())

    model = cp_model.CpModel()
    starts = {task.name: model.new_int_var(0, horizon, task.name) for task in problem.tasks}
    least = min(horizon, math.floor(lower_bound_us(problem) / TICK_US))
    makespan = model.new_int_var(least, horizon, "makespan")
    for stream in problem.streams:
        mine = [task.name for task in problem.tasks if task.stream == stream]
        model.add_no_overlap(
            [model.new_fixed_size_interval_var(starts[name], ticks[name], name) for name in mine]
        )
    for task in problem.tasks:
        for before in task.after:
            model.add(starts[task.name] >= starts[before] + ticks[before])
        model.add(makespan >= starts[task.name] + ticks[task.name])
        model.add_hint(starts[task.name], min(horizon, math.ceil(hint[task.name] / TICK_US)))
    for first, second in _interchangeable(problem):
        model.add(starts[first] <= starts[second])
    model.minimize(makespan)

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = (
        False  # else CP-SAT leaves Ctrl-C to the system's default afterwards
    )
    solver.parameters.random_seed = seed
    code = solver.solve(model)
    statuses = {cp_model.OPTIMAL: "optimal", cp_model.FEASIBLE: "feasible", cp_model.UNKNOWN: "unknown"}
    if code not in statuses:  # every problem has a schedule, so INFEASIBLE and MODEL_INVALID are our mistake
        raise MoeccError(f"the scheduler's model is wrong: CP-SAT says {solver.status_name(code)}")
    if statuses[code] == "unknown":
        return None, 0.0, "unknown"

    found = {task.name: solver.value(starts[task.name]) for task in problem.tasks}
    # At equal starts, a task of no length goes first on its stream, as CP-SAT allowed it to.
    order = sorted(topological_order(problem.tasks), key=lambda t: (found[t.name], ticks[t.name] > 0))
    return order, solver.best_objective_bound * TICK_US - rounding_us, statuses[code]


def _interchangeable(problem: ScheduleProblem) -> list[tuple[str, str]]:
    """Pairs of first tasks of neighbouring chunks, if renaming the chunks leaves the problem as it is.

    Then some shortest schedule starts the chunks in the order of their numbers; without that, the solver visits
    each schedule once per permutation of the chunks.
    """
    chunks: dict[int, list[Task]] = {}
    for task in problem.tasks:
        if task.chunk is not None:
            chunks.setdefault(task.chunk, []).append(task)
    whole = [task for task in problem.tasks if task.chunk is None]
    if len(chunks) < 2 or len({_role(tasks, whole) for tasks in chunks.values()}) > 1:
        return []
    firsts = [chunks[number][0].name for number in sorted(chunks)]
    return list(pairwise(firsts))


def _role(tasks: Sequence[Task], whole: Sequence[Task]) -> Hashable:
    """What one chunk's tasks are to the problem, whatever the chunk is called; unlike any other's if they wait for
    another chunk."""
    places: dict[str, Hashable] = {task.name: task.name for task in whole}
    places |= {task.name: number for number, task in enumerate(tasks)}

    def before(task: Task) -> Hashable:
        return frozenset(places.get(name, name) for name in task.after)

    inside = tuple((task.stream, task.duration_us, before(task)) for task in tasks)
    names = {task.name for task in tasks}
    return inside, tuple(frozenset(places[name] for name in task.after if name in names) for task in whole)
