"""Schedules as JSON: `schedule.json` for the runtime, trace events for Perfetto and chrome://tracing."""

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


def timeline(
    problem: ScheduleProblem, schedule: Schedule, *, process: str = "predicted step"
) -> dict[str, Any]:
    """The schedule in the Trace Event Format: one thread per stream, one complete event per task, in us."""
    threads = {stream: number for number, stream in enumerate(schedule.order, start=1)}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": process}}
    ]
    for stream, tid in threads.items():
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": stream}})
        events.append(
            {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": tid, "args": {"sort_index": tid}}
        )
    for task in sorted(problem.tasks, key=lambda task: schedule.starts_us[task.name]):
        events.append(
            {
                "name": task.name,
                "cat": f"chunk {task.chunk}",
                "ph": "X",
                "pid": 1,
                "tid": threads[task.stream],
                "ts": schedule.starts_us[task.name],
                "dur": task.duration_us,
                "args": {"chunk": task.chunk, "after": list(task.after)},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}
