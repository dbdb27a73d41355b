"""Schedules as plain data."""

from __future__ import annotations

from typing import Any

from moecc.solvers.schedule.problem import Schedule, ScheduleProblem, serial_makespan
from moecc.solvers.schedule.split import SplitDecision

SCHEMA = "moecc.schedule/1"


def schedule_json(
    problem: ScheduleProblem, schedule: Schedule, *, decision: SplitDecision | None = None
) -> dict[str, Any]:
    """The schedule with its certificate as plain JSON data, times in microseconds, tasks by start time."""
    tasks = sorted(problem.tasks, key=lambda task: schedule.starts_us[task.name])
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "makespan_us": schedule.makespan_us,
        "serial_us": serial_makespan(problem),
        "certificate": {"status": schedule.status, "bound_us": schedule.bound_us, "gap": schedule.gap},
        "order": {stream: list(names) for stream, names in schedule.order.items()},
        "tasks": [
            {
                "name": task.name,
                "stream": task.stream,
                "chunk": task.chunk,
                "start_us": schedule.starts_us[task.name],
                "duration_us": task.duration_us,
                "after": list(task.after),
            }
            for task in tasks
        ],
    }
    if decision is not None:
        data["split"] = _split_json(decision)
    return data


def _split_json(decision: SplitDecision) -> dict[str, Any]:
    candidates = {
        str(chunks): {
            "makespan_us": schedule.makespan_us,
            "bound_us": schedule.bound_us,
            "status": schedule.status,
        }
        for chunks, schedule in decision.schedules.items()
    }
    return {"chunks": decision.chunks, "unsplit_serial_us": decision.serial_us, "candidates": candidates}
