"""All kernels of a model: emitted modules, binaries for every target, and what they occupy there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from moecc.autotune.defaults import default_configs
from moecc.codegen.aot import CompiledKernel, Job, compile_batch
from moecc.codegen.emit import emit_module
from moecc.codegen.frozen import call_bytes, kernel_sequence
from moecc.codegen.layers import Entry, KernelSet, kernel_set, kernel_sets
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.ir.core import Function, Module
from moecc.ir.types import DTYPE_BYTES

HOSTS = ("x86", "interpret")
WORKERS = 2  # compiler processes at once, about 0.5 GB each


@dataclass(frozen=True)
class BuiltKernels:
    """files: artifact path -> content. table: one row for each kernel and target, as the report shows them."""

    files: dict[str, str | bytes] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)


def build_kernels(
    sets: Sequence[KernelSet], targets: Sequence[str], progress: Callable[[str, int, int], None]
) -> BuiltKernels:
    """Emits every set with the default configs of the targets, of x86 and of the interpreter, which run it where no
    GPU is, and compiles it for each target.

    Raises InputError for a shape that a target cannot run, MoeccError where Triton fails.
    """
    built = BuiltKernels()
    jobs: list[tuple[KernelSet, Job]] = []
    for kernels in sets:
        configs = {target: default_configs(kernels.shape, target) for target in (*targets, *HOSTS)}
        built.files[kernels.file] = emit_module(kernels.shape, configs, kernels.name)
        for target in targets:
            sequence = kernel_sequence(freeze_configs(configs[target]), kernels.shape.expert_tokens)
            jobs += [
                (kernels, Job(shape=kernels.shape, configs=configs[target], target=target, kernels=(name,)))
                for name in _needed(kernels.entry, sequence)
            ]
    for (kernels, job), compiled in zip(jobs, _compiled([job for _, job in jobs], progress), strict=True):
        _add(built, kernels, job.target, compiled)
    return built


def workspace_bytes(module: Module, targets: Sequence[str]) -> int:
    """Device memory that the hungriest function needs beside weights and KV cache: for every token chunk the buffers of
    its kernels and, where tokens travel, those received and the sums that go back. Chunks may all be in flight.
    """
    sets = kernel_sets(module)
    return max((_function_bytes(function, sets, targets) for function in module.functions), default=0)


def _function_bytes(function: Function, sets: Sequence[KernelSet], targets: Sequence[str]) -> int:
    chunks = function.attributes["schedule"]["split"]["chunks"]
    needed = 0
    for suffix, calls in (("", chunks), ("_shared", 1)):
        kernels = kernel_set(sets, function, suffix)
        if kernels is not None:
            needed += calls * max(_call_bytes(kernels, target) for target in targets)
    return needed


def _call_bytes(kernels: KernelSet, target: str) -> int:
    shape = kernels.shape
    element = DTYPE_BYTES[shape.dtype]
    travelling = 2 * (shape.received or 0) * shape.hidden * element
    return travelling + call_bytes(
        freeze_layer(shape),
        freeze_configs(default_configs(shape, target)),
        tokens=shape.expert_tokens,
        experts=shape.held_experts,
        shared=shape.shared,
        routed_here=kernels.entry != "experts",
        element_bytes=element,
    )


def _needed(entry: Entry, forward: tuple[str, ...]) -> tuple[str, ...]:
    """The kernels of a set, given those of one forward call: a routing made elsewhere is planned, not routed."""
    if entry == "forward":
        return forward
    return (*(("router",) if entry == "distributed" else ()), "plan", *forward[1:])


def _compiled(jobs: Sequence[Job], progress: Callable[[str, int, int], None]) -> list[CompiledKernel]:
    """The kernels of `jobs`, one each and in order, from processes that share the work."""
    shares = [range(worker, len(jobs), WORKERS) for worker in range(WORKERS)]
    found: dict[int, CompiledKernel] = {}
    progress("kernels", 0, len(jobs))
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {
            pool.submit(compile_batch, [jobs[i] for i in share]): share for share in shares if len(share)
        }
        for future in as_completed(running):
            found |= {i: batch[0] for i, batch in zip(running[future], future.result(), strict=True)}
            progress("kernels", len(found), len(jobs))
    return [found[i] for i in range(len(jobs))]


def _add(built: BuiltKernels, kernels: KernelSet, target: str, compiled: CompiledKernel) -> None:
    stem = f"kernels/{target}/{kernels.name}.{compiled.name}"
    built.files[f"{stem}.{compiled.assembly_suffix}"] = compiled.assembly
    built.files[f"{stem}.{compiled.binary_suffix}"] = compiled.binary
    built.table.append(
        {"set": kernels.name, "kernel": compiled.name, "target": target, **asdict(compiled.resources)}
    )
