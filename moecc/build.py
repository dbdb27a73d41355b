"""All kernels of a model: emitted modules, binaries for every target, and what they occupy there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moecc.autotune.defaults import default_configs
from moecc.codegen.aot import compile_kernels
from moecc.codegen.emit import emit_module
from moecc.codegen.layers import KernelSet


@dataclass(frozen=True)
class BuiltKernels:
    """files: artifact path -> content. table: one row for each kernel and target, as the report shows them."""

    files: dict[str, str | bytes] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)


def build_kernels(
    sets: Sequence[KernelSet], targets: Sequence[str], progress: Callable[[str, int, int], None]
) -> BuiltKernels:
    """Emits every set with the default configs of the targets and of the interpreter, and compiles it for each target.

    Raises InputError for a shape that a target cannot run, MoeccError where Triton fails.
    """
    built = BuiltKernels()
    for index, kernels in enumerate(sets):
        configs = {target: default_configs(kernels.shape, target) for target in (*targets, "interpret")}
        built.files[kernels.file] = emit_module(kernels.shape, configs, kernels.name)
        for number, target in enumerate(targets):
            progress("kernels", index * len(targets) + number, len(sets) * len(targets))
            for kernel in compile_kernels(kernels.shape, configs[target], target):
                stem = f"kernels/{target}/{kernels.name}.{kernel.name}"
                built.files[f"{stem}.{kernel.assembly_suffix}"] = kernel.assembly
                built.files[f"{stem}.{kernel.binary_suffix}"] = kernel.binary
                built.table.append(
                    {
                        "set": kernels.name,
                        "kernel": kernel.name,
                        "target": target,
                        **asdict(kernel.resources),
                    }
                )
    return built
