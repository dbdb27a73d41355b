"""Tasks on fixed streams with dependencies, and the bounds that need no search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moecc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kernel or transfer: runs on `stream` for `duration_us` once all tasks named in `after` have ended.

    chunk: which share of the tokens it works on, from 0; None: on all of them.
    """

    name: str
    stream: str
    duration_us: float
    after: tuple[str, ...] = ()
    chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduleProblem:
    """Tasks with distinct names and dependencies without a cycle; anything else is an InputError."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for task in self.tasks:
            if task.name in known:
                raise InputError(f"two tasks are named {task.name!r}")
            known.add(task.name)
            if not (math.isfinite(task.duration_us) and task.duration_us >= 0):
                hint = "give a finite time of at least 0"
                raise InputError(f"task {task.name!r} lasts {task.duration_us} us", hint=hint)
        for task in self.tasks:
            for before in task.after:
                if before not in known:
                    raise InputError(f"task {task.name!r} waits for {before!r}, which does not exist")
        topological_order(self.tasks)

    @property
    def streams(self) -> tuple[str, ...]:
        """In the order in which the tasks first name them."""
        return tuple(dict.fromkeys(task.stream for task in self.tasks))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Start times with their certificate.

    bound_us: no schedule of the problem is shorter.
    status: "optimal" (proven, to the resolution of the solver's clock), "feasible" (stopped at the time limit)
    or "heuristic" (list scheduling, where the limit was too short for the solver to find anything).
    order: per stream, the names of its tasks by start time.
    """

    starts_us: Mapping[str, float]
    makespan_us: float
    bound_us: float
    status: str
    order: Mapping[str, tuple[str, ...]]

    @property
    def gap(self) -> float:
        """The fraction of the makespan that a better schedule could save at most."""
        return max(0.0, 1.0 - self.bound_us / self.makespan_us) if self.makespan_us else 0.0


def topological_order(tasks: tuple[Task, ...]) -> list[Task]:
    """Every task behind those it waits for, otherwise in the given order (Kahn 1962); a cycle is an InputError."""
    waiting = {task.name: set(task.after) for task in tasks}
    order: list[Task] = []
    done: set[str] = set()
    while len(order) < len(tasks):
        ready = [task for task in tasks if task.name not in done and waiting[task.name] <= done]
        if not ready:
            stuck = ", ".join(task.name for task in tasks if task.name not in done)
            raise InputError(f"tasks wait for one another in a cycle, or behind one: {stuck}")
        order += ready
        done.update(task.name for task in ready)
    return order


def serial_makespan(problem: ScheduleProblem) -> float:
    """The makespan on a single stream: the sum of all durations, in microseconds."""
    return math.fsum(task.duration_us for task in problem.tasks)


def heads_and_tails(problem: ScheduleProblem) -> tuple[dict[str, float], dict[str, float]]:
    """Per task, the longest chain of dependencies that must end before it starts, and that starts after its end."""
    order = topological_order(problem.tasks)
    heads = {task.name: 0.0 for task in order}
    tails = dict(heads)
    length = {task.name: task.duration_us for task in order}
    for task in order:
        heads[task.name] = max((heads[name] + length[name] for name in task.after), default=0.0)
    for task in reversed(order):
        for name in task.after:
            tails[name] = max(tails[name], tails[task.name] + task.duration_us)
    return heads, tails


def lower_bound_us(problem: ScheduleProblem) -> float:
    """The larger of the longest chain and, over streams, shortest head + work + shortest tail (Carlier 1982)."""
    heads, tails = heads_and_tails(problem)
    chain = max((heads[t.name] + t.duration_us + tails[t.name] for t in problem.tasks), default=0.0)
    loads = [0.0]
    for stream in problem.streams:
        mine = [task for task in problem.tasks if task.stream == stream]
        work = math.fsum(task.duration_us for task in mine)
        loads.append(min(heads[t.name] for t in mine) + work + min(tails[t.name] for t in mine))
    return max(chain, *loads)
