"""All kernels of a model: emitted modules, binaries for every target, and what they occupy there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from moecc.autotune.binaries import Binaries
from moecc.autotune.choose import choose
from moecc.autotune.layer_configs import UNIFORM
from moecc.codegen.aot import CompiledKernel, Job, compile_batch
from moecc.codegen.emit import emit_module
from moecc.codegen.frozen import call_bytes, kernel_sequence
from moecc.codegen.layers import Entry, KernelSet, kernel_set, kernel_sets
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.ir.core import Function, Module
from moecc.ir.types import DTYPE_BYTES

HOSTS = ("x86", "interpret")
WORKERS = 2  # compiler processes at once, about 0.5 GB each


@dataclass
class BuiltKernels:
    """files: artifact path -> content. table: one row for each kernel and target, as the report shows them.

    configs: one row for each set and target, whether its configs are tuned or the default, and why.
    compiled, reused: kernels that were compiled now, and those that an earlier compile has left.
    """

    files: dict[str, str | bytes] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    configs: list[dict[str, Any]] = field(default_factory=list)
    compiled: int = 0
    reused: int = 0


def build_kernels(
    sets: Sequence[KernelSet],
    targets: Sequence[str],
    progress: Callable[[str, int, int], None],
    *,
    routing: str = UNIFORM,
) -> BuiltKernels:
    """Emits every set with the configs that were tuned for a routing of that class, or the default ones, for the
    targets and for x86 and the interpreter, which run it where no GPU is, and compiles it for each target.

    Raises InputError for a shape that a target cannot run, MoeccError where Triton fails.
    """
    built = BuiltKernels()
    jobs: list[tuple[KernelSet, Job]] = []
    for kernels in sets:
        chosen = {
            target: choose(kernels.shape, target, routing=routing)
            for target in dict.fromkeys((*targets, *HOSTS))
        }
        configs = {target: choice.configs for target, choice in chosen.items()}
        built.configs.extend(
            {"set": kernels.name, "target": target, **choice.provenance()}
            for target, choice in chosen.items()
        )
        built.files[kernels.file] = emit_module(kernels.shape, configs, kernels.name)
        for target in targets:
            sequence = kernel_sequence(freeze_configs(configs[target]), kernels.shape.expert_tokens)
            jobs += [
                (kernels, Job(shape=kernels.shape, configs=configs[target], target=target, kernels=(name,)))
                for name in _needed(kernels.entry, sequence)
            ]
    compiled, built.reused = _found_or_compiled([job for _, job in jobs], progress)
    built.compiled = len(jobs) - built.reused
    for (kernels, job), kernel in zip(jobs, compiled, strict=True):
        _add(built, kernels, job.target, kernel)
    return built


def _found_or_compiled(
    jobs: Sequence[Job], progress: Callable[[str, int, int], None]
) -> tuple[list[CompiledKernel], int]:
    """The kernels of `jobs`, one each and in order, and how many of them an earlier compile has left."""
    store = Binaries.of_user()
    found = {index: kernel for index, job in enumerate(jobs) if (kernel := store.get(job))}
    missing = [index for index in range(len(jobs)) if index not in found]
    for index, kernel in zip(missing, _compiled([jobs[i] for i in missing], progress), strict=True):
        found[index] = kernel
        store.put(jobs[index], kernel)
    store.prune()
    return [found[index] for index in range(len(jobs))], len(jobs) - len(missing)


def workspace_bytes(module: Module, targets: Sequence[str], *, routing: str = UNIFORM) -> int:
    """Device memory that the hungriest function needs beside weights and KV cache: for every token chunk the buffers of
    its kernels and, where tokens travel, those received and the sums that go back. Chunks may all be in flight.
    """
    sets = kernel_sets(module)
    return max(
        (_function_bytes(function, sets, targets, routing) for function in module.functions), default=0
    )


def _function_bytes(
    function: Function, sets: Sequence[KernelSet], targets: Sequence[str], routing: str
) -> int:
    chunks = function.attributes["schedule"]["split"]["chunks"]
    needed = 0
    for suffix, calls in (("", chunks), ("_shared", 1)):
        kernels = kernel_set(sets, function, suffix)
        if kernels is not None:
            needed += calls * max(_call_bytes(kernels, target, routing) for target in targets)
    return needed


def _call_bytes(kernels: KernelSet, target: str, routing: str) -> int:
    shape = kernels.shape
    element = DTYPE_BYTES[shape.dtype]
    travelling = 2 * (shape.received or 0) * shape.hidden * element
    return travelling + call_bytes(
        freeze_layer(shape),
        freeze_configs(choose(shape, target, routing=routing).configs),
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
