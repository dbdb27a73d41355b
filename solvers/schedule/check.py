"""A second opinion on schedules; shares no code with the solver."""

from __future__ import annotations

import math
from itertools import pairwise

from moecc.errors import MoeccError
from moecc.solvers.schedule.problem import Schedule, ScheduleProblem

TOLERANCE_US = 1e-6  # float sums of microseconds over a step


def check_schedule(problem: ScheduleProblem, schedule: Schedule) -> None:
    """Raise MoeccError, naming the tasks, unless `schedule` is one of `problem`.

    Every task starts once, at a time >= 0 and after the tasks that it waits for; tasks of a stream do not overlap
    and stand in `order`; makespan_us is the last end; bound_us does not exceed it.
    """
    tasks = {task.name: task for task in problem.tasks}
    if set(schedule.starts_us) != set(tasks):
        wrong = sorted(set(schedule.starts_us) ^ set(tasks))
        raise MoeccError(f"schedule and problem differ in tasks: {', '.join(wrong)}")
    for name, start in schedule.starts_us.items():
        if not math.isfinite(start) or start < -TOLERANCE_US:
            raise MoeccError(f"task {name!r} starts at {start} us")
        for before in tasks[name].after:
            if schedule.starts_us[before] + tasks[before].duration_us > start + TOLERANCE_US:
                raise MoeccError(f"task {name!r} starts before {before!r} ends")
    listed = sorted(name for names in schedule.order.values() for name in names)
    if listed != sorted(tasks):
        raise MoeccError("order does not list every task exactly once")
    for stream, names in schedule.order.items():
        for name in names:
            if tasks[name].stream != stream:
                raise MoeccError(f"task {name!r} is listed on stream {stream!r}")
        for first, second in pairwise(names):
            end = schedule.starts_us[first] + tasks[first].duration_us
            if end > schedule.starts_us[second] + TOLERANCE_US:
                raise MoeccError(f"tasks {first!r} and {second!r} overlap on stream {stream!r}")
    last = max((schedule.starts_us[name] + tasks[name].duration_us for name in tasks), default=0.0)
    if abs(last - schedule.makespan_us) > TOLERANCE_US:
        raise MoeccError(f"makespan is {schedule.makespan_us} us, but the last task ends at {last} us")
    if schedule.bound_us > schedule.makespan_us + TOLERANCE_US:
        raise MoeccError(f"bound {schedule.bound_us} us exceeds the makespan {schedule.makespan_us} us")
