"""The figures that a compile ends with, each with what it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moecc.build import BuiltKernels
from moecc.hardware import Cluster, DeviceSpec, MemoryUse
from moecc.ir.core import Function, Module
from moecc.ir.ops import Attention, Experts
from moecc.ir.types import WeightsType
from moecc.passes.settings import section, settings_of

SCHEMA = "moecc.report/1"
PHASES = ("decode", "prefill")


def device_memory_use(module: Module, device: DeviceSpec, workspace_bytes: int = 0) -> MemoryUse:
    """What one device holds: its expert slots, the rest of the weights whole, the KV cache of `cached_sequences` at
    full context, and a workspace. The module may stand before or behind any pass."""
    functions = [f for f in module.functions if f.attributes.get("phase", "decode") == "decode"]
    sequences, slots = cached_sequences(module), _wanted_slots(module)
    layers = sum(_weights_of_layers(function, slots) for function in functions)
    return MemoryUse(
        weights_bytes=module.attributes["embedding_bytes"] + layers,
        kv_cache_bytes=sum(_kv_of_layers(f, sequences) for f in functions),
        workspace_bytes=workspace_bytes,
        capacity_bytes=device.memory_bytes,
    )


def cached_sequences(module: Module) -> int:
    """Those of one decode step; under `migrate` of all devices, for a token may land on any."""
    settings = settings_of(module)
    return settings.decode * (settings.devices if settings.execution == "migrate" else 1)


def _wanted_slots(module: Module) -> Callable[[int], int]:
    """Of so many experts, how many a device holds."""
    devices = settings_of(module).devices
    wanted = section(module, "placement_request").get("slots_per_device")
    return lambda experts: experts if devices == 1 else int(wanted or -(-experts // devices))


def _weights_of_layers(function: Function, slots: Callable[[int], int]) -> int:
    """Until communication is placed a function holds the weights of all experts, a device those of its slots."""
    arguments = sum(a.type.bytes for a in function.arguments if isinstance(a.type, WeightsType))
    attention = sum(op.weight_bytes for op in function.every(Attention))
    for op in function.every(Experts):
        for type in (v.type for v in op.all_operands if isinstance(v.type, WeightsType)):
            experts = type.shape[0]
            arguments -= type.bytes // experts * (experts - slots(experts))
    return len(function.attributes["layers"]) * (arguments + attention)


def _kv_of_layers(function: Function, sequences: int) -> int:
    per_sequence = sum(
        op.kv_bytes_per_token * op.context + op.state_bytes for op in function.every(Attention)
    )
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
        "configs": built.configs,
        "kernel_cache": {"compiled": built.compiled, "reused": built.reused},
        "memory": {
            **asdict(memory),
            "used_bytes": memory.used_bytes,
            "cached_sequences": cached_sequences(module),
        },
        "notes": [*_notes(module, cluster), *_config_notes(built)],
        "seconds": round(seconds(), 3),
    }


def _config_notes(built: BuiltKernels) -> list[str]:
    """How many sets run tuned configs on each target that can be tuned, and why others do not."""
    notes = []
    for target in dict.fromkeys(row["target"] for row in built.configs):
        rows = [row for row in built.configs if row["target"] == target]
        tuned = sum(row["source"] == "tuned" for row in rows)
        reasons = dict.fromkeys(row["because"] for row in rows if row["source"] == "default")
        if target != "interpret":
            why = f"; default: {'; '.join(reasons)}" if reasons else ""
            notes.append(f"{target}: {tuned} of {len(rows)} kernel sets have tuned configs{why}")
    return notes


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
        notes += [f"placement: {text}" for text in figures["warnings"]]
        notes += [f"execution {name}: {text}" for name, text in figures["affinity"].items()]
        if figures["after"]["imbalance"] > 1.5 * figures["before"]["imbalance"]:
            notes.append("the placement trades balance for traffic: set placement.max_imbalance to bound it")
    for function in module.functions:
        notes += [f"{function.name}: not fused: {text}" for text in function.attributes.get("unfused", [])]
        split = function.attributes["schedule"]["split"]
        if len(split["candidates"]) > 1 and split["chunks"] == 1:
            notes.append(f"{function.name}: not splitting the tokens is best")
    return notes
