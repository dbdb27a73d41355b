"""Compiles a layer's kernels ahead of time, without the device, and reports what they will occupy on it."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.codegen.config import KernelConfigs, LayerShape


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one program occupies, read from the binary and not estimated.

    registers: per thread (VGPRs on AMD). spill_bytes: per thread, in local memory. loop_instructions: machine
    instructions of the longest innermost loop, 0 without one.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    loop_instructions: int
    uses_wgmma: bool
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel's assembly and binary; `assembly_suffix` is ptx or amdgcn, `binary_suffix` cubin or hsaco."""

    name: str
    target: str
    assembly: str
    assembly_suffix: str
    binary: bytes
    binary_suffix: str
    resources: Resources


def compile_kernels(shape: LayerShape, configs: KernelConfigs, target: str) -> list[CompiledKernel]:
    """Every kernel that the layer's launcher can launch on that target, in launch order."""
    raise NotImplementedError
