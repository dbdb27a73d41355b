"""The predicted schedules of a module as files: for the host, and for Perfetto or chrome://tracing."""

from __future__ import annotations

from typing import Any

from moecc.ir.core import Module

SCHEMA = "moecc.schedule/1"


def schedules(module: Module) -> dict[str, Any]:
    """Every function's schedule with the layers and the phase it stands for."""
    return {
        "schema": SCHEMA,
        "functions": [
            {
                "name": function.name,
                **{key: function.attributes[key] for key in ("layers", "phase", "tokens")},
                **function.attributes["schedule"],
            }
            for function in module.functions
        ],
    }


def timeline(module: Module) -> dict[str, Any]:
    """Trace Event Format: one process for each function, one thread for each stream, times in microseconds."""
    events: list[dict[str, Any]] = []
    for pid, function in enumerate(module.functions, start=1):
        schedule = function.attributes["schedule"]
        layers = len(function.attributes["layers"])
        events.append(_name("process_name", pid, 0, f"{function.name}, one of {layers} layers (predicted)"))
        streams = list(dict.fromkeys(task["stream"] for task in schedule["tasks"]))
        events += [_name("thread_name", pid, tid, stream) for tid, stream in enumerate(streams, start=1)]
        events += [_event(task, pid, streams.index(task["stream"]) + 1) for task in schedule["tasks"]]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _event(task: dict[str, Any], pid: int, tid: int) -> dict[str, Any]:
    return {
        "name": task["name"],
        "cat": "all tokens" if task["chunk"] is None else f"chunk {task['chunk']}",
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": task["start_us"],
        "dur": task["duration_us"],
        "args": {"after": task["after"]},
    }
