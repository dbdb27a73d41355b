"""The compiler, from a spec to an artifact: import, PIPELINE, kernels, predictions, files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecc.artifact import Artifact, check_destination, sha256, write_artifact
from moecc.autotune.routing_class import routing_class, shares_of
from moecc.build import build_kernels, workspace_bytes
from moecc.codegen.layers import kernel_sets
from moecc.codegen.targets import find_target
from moecc.errors import InputError, MoeccError
from moecc.frontend.spec import CompileSpec, locate
from moecc.frontend.to_ir import import_model
from moecc.frontend.workloads import workloads
from moecc.hardware import Cluster, MemoryUse, load_device
from moecc.ir.core import Module
from moecc.ir.printer import print_module
from moecc.ir.verifier import verify
from moecc.passes.manager import Context, run_passes
from moecc.passes.pipeline import PIPELINE
from moecc.report import device_memory_use, report
from moecc.timeline import schedules, timeline

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compiled:
    """The artifact and the figures of the closing table."""

    artifact: Artifact
    report: Mapping[str, Any]


def compile_model(
    spec: CompileSpec, output: Path, progress: Progress = lambda stage, done, total: None
) -> Compiled:
    """Compiles `spec` into the artifact folder `output`, all or nothing.

    progress(stage, done, total) is told what happens; total 0 means that nobody can tell how much is left.
    Raises InputError for wrong input, MoeccError for work that failed, also where the model does not fit its
    devices; what stood at `output` is then untouched.
    """
    started = time.monotonic()
    check_destination(output)
    cluster, targets = _hardware(spec)
    routings = workloads(spec)
    routing = routing_class(shares_of(routings))
    module = import_model(spec)
    verify(module)
    _require_fit(device_memory_use(module, cluster.device), spec)
    files: dict[str, str | bytes] = {"ir/00-import.moe": print_module(module)}

    def keep(name: str, module: Module) -> None:
        files[f"ir/{len(files):02}-{name}.moe"] = print_module(module)

    run_passes(module, PIPELINE, Context(workloads=routings, progress=progress), keep)
    memory = device_memory_use(module, cluster.device, workspace_bytes(module, targets, routing=routing))
    _require_fit(memory, spec)
    built = build_kernels(kernel_sets(module), targets, progress, routing=routing)
    figures = report(module, cluster, memory, built, seconds=lambda: time.monotonic() - started)
    files |= built.files
    files |= {
        "schedule.json": _json(schedules(module)),
        "timeline.json": _json(timeline(module)),
        "report.json": _json(figures),
    }
    if "placement" in module.attributes:
        files["placement.json"] = _json(module.attributes["placement"])
    progress("write", 0, 0)
    return Compiled(write_artifact(output, files, _inputs(spec)), figures)


def _require_fit(memory: MemoryUse, spec: CompileSpec) -> None:
    if memory.fits:
        return
    sizes = {
        "weights": memory.weights_bytes,
        "KV cache": memory.kv_cache_bytes,
        "workspace": memory.workspace_bytes,
    }
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    raise MoeccError(
        f"one device needs {memory.used_bytes / 1e9:.1f} GB ({parts}) and has {memory.capacity_bytes / 1e9:.1f} GB",
        where=locate(spec.locations, "cluster", spec.source),
        hint="use more devices, or lower serving.tokens_per_device.decode or serving.context_length",
    )


def _hardware(spec: CompileSpec) -> tuple[Cluster, tuple[str, ...]]:
    where = locate(spec.locations, "cluster.device", spec.source)
    try:
        device = load_device(spec.cluster.device)
    except InputError as error:
        raise InputError(error.message, where=where, hint=error.hint) from None
    targets = spec.targets or (device.target,)
    for target in targets:
        try:
            find_target(target)
        except InputError as error:
            where = locate(spec.locations, "targets", where)
            raise InputError(error.message, where=where, hint=error.hint) from None
    cluster = Cluster(device=device, nodes=spec.cluster.nodes, devices_per_node=spec.cluster.devices_per_node)
    return cluster, tuple(dict.fromkeys(targets))


def _inputs(spec: CompileSpec) -> dict[str, str]:
    """Digests of what was compiled, by its role: an artifact names no machine's paths."""
    files = {"model.yaml": Path(spec.source), "config.json": Path(spec.model.source)}
    files |= {f"trace:{w.name}": w.trace for w in spec.workloads if isinstance(w.trace, Path)}
    if files["model.yaml"] == files["config.json"]:
        del files["config.json"]
    found = {name: sha256(file.read_bytes()) for name, file in files.items() if file.is_file()}
    return found | dict(spec.digests)


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n"
