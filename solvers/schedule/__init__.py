"""When every kernel and every transfer of one step starts, and into how many token chunks the step is split."""

from __future__ import annotations

from moecc.solvers.schedule.as_json import schedule_json
from moecc.solvers.schedule.check import check_schedule
from moecc.solvers.schedule.problem import Schedule, ScheduleProblem, Task, lower_bound_us, serial_makespan
from moecc.solvers.schedule.solve import solve_schedule
from moecc.solvers.schedule.split import SplitDecision, best_split

__all__ = [
    "Schedule",
    "ScheduleProblem",
    "SplitDecision",
    "Task",
    "best_split",
    "check_schedule",
    "lower_bound_us",
    "schedule_json",
    "serial_makespan",
    "solve_schedule",
]
