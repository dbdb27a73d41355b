"""The figures that a compile ends with, each with what it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moecc.build import BuiltKernels
from moecc.hardware import Cluster, DeviceSpec, MemoryUse
from moecc.ir.core import Function, Module
from moecc.ir.ops import Attention
from moecc.ir.types import WeightsType

SCHEMA = "moecc.report/1"
PHASES = ("decode", "prefill")


def device_memory_use(module: Module, device: DeviceSpec) -> MemoryUse:
    """What one device holds of a lowered module: its expert slots, the rest of the weights whole, the KV cache of
    one decode step's sequences at full context, and the largest workspace of a function."""
    decode = [f for f in module.functions if f.attributes["phase"] == "decode"]
    sequences = module.attributes["serving"]["decode"]
    return MemoryUse(
        weights_bytes=module.attributes["embedding_bytes"] + sum(_weights_of_layers(f) for f in decode),
        kv_cache_bytes=sum(_kv_of_layers(f, sequences) for f in decode),
        workspace_bytes=max((f.attributes.get("workspace_bytes", 0) for f in module.functions), default=0),
        capacity_bytes=device.memory_bytes,
    )


def _weights_of_layers(function: Function) -> int:
    arguments = sum(a.type.bytes for a in function.arguments if isinstance(a.type, WeightsType))
    attention = sum(op.weight_bytes for op in function.every(Attention))
    return len(function.attributes["layers"]) * (arguments + attention)


def _kv_of_layers(function: Function, sequences: int) -> int:
    per_sequence = sum(op.kv_bytes_per_token * op.context for op in function.every(Attention))
    return len(function.attributes["layers"]) * per_sequence * sequences


def report(
    module: Module, cluster: Cluster, memory: MemoryUse, built: BuiltKernels, seconds: Callable[[], float]
) -> dict[str, Any]:
    """All figures as plain data: placement, predicted steps, kernels, memory, and the notes that belong to them."""
    placement = module.attributes.get("placement")
    return {
        "schema": SCHEMA,
        "model": module.name,
        "cluster": module.attributes["cluster"],
        "serving": module.attributes["serving"],
        "placement": placement and {"certificate": placement["certificate"], **placement["report"]},
        "steps": [_step(module, phase) for phase in PHASES],
        "kernels": built.table,
        "memory": {**asdict(memory), "used_bytes": memory.used_bytes, "fits": memory.fits},
        "notes": _notes(module, cluster),
        "seconds": round(seconds(), 3),
    }


def _step(module: Module, phase: str) -> dict[str, Any]:
    """One pass through all layers, as predicted: every layer after the other, streams overlapped within each."""
    functions = [f for f in module.functions if f.attributes["phase"] == phase]
    totals = {"serial_us": 0.0, "makespan_us": 0.0, "bound_us": 0.0}
    for function in functions:
        for name, time_us in _times(function).items():
            totals[name] += len(function.attributes["layers"]) * time_us
    return {
        "phase": phase,
        "tokens_per_device": module.attributes["serving"][phase],
        **totals,
        "functions": [
            {
                "name": f.name,
                "layers": len(f.attributes["layers"]),
                "chunks": f.attributes["schedule"]["split"]["chunks"],
                "status": f.attributes["schedule"]["certificate"]["status"],
                **_times(f),
            }
            for f in functions
        ],
    }


def _times(function: Function) -> dict[str, float]:
    """Of one layer: on one stream without a split, overlapped as scheduled, and the proven bound of all candidates."""
    schedule = function.attributes["schedule"]
    split = schedule["split"]
    return {
        "serial_us": split["unsplit_serial_us"],
        "makespan_us": schedule["makespan_us"],
        "bound_us": min(candidate["bound_us"] for candidate in split["candidates"].values()),
    }


def _notes(module: Module, cluster: Cluster) -> list[str]:
    """Assumptions, doubts, and what was not done."""
    notes = [*module.attributes["notes"]]
    notes.append(f"GPU times are predictions; {cluster.device.confidence()}")
    placement = module.attributes.get("placement")
    if placement:
        figures = placement["report"]
        notes += [f"placement, fan-out and times rest on an {text}" for text in figures["assumptions"]]
        if placement["certificate"]["note"]:
            notes.append(f"placement: {placement['certificate']['note']}")
        if figures["after"]["imbalance"] > 1.5 * figures["before"]["imbalance"]:
            notes.append("the placement trades balance for traffic: set placement.max_imbalance to bound it")
    for function in module.functions:
        notes += [f"{function.name}: not fused: {text}" for text in function.attributes.get("unfused", [])]
        split = function.attributes["schedule"]["split"]
        if len(split["candidates"]) > 1 and split["chunks"] == 1:
            notes.append(f"{function.name}: not splitting the tokens is best")
    return notes
