"""Compiles a layer's kernels ahead of time, without the device, and reports what they will occupy on it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.config import KernelConfigs, LayerShape, why_invalid
from moecc.codegen.resources import Resources
from moecc.codegen.targets import find_target
from moecc.errors import InputError, MoeccError


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel's assembly and binary; `assembly_suffix` is ptx, amdgcn or s, `binary_suffix` cubin, hsaco or so."""

    name: str
    target: str
    assembly: str
    assembly_suffix: str
    binary: bytes
    binary_suffix: str
    resources: Resources


@dataclass(frozen=True, kw_only=True)
class Job:
    """One set of kernels to compile: those of `forward` at shape.tokens, or those named."""

    shape: LayerShape
    configs: KernelConfigs
    target: str
    kernels: tuple[str, ...] | None = None


def compile_kernels(
    shape: LayerShape, configs: KernelConfigs, target: str, *, kernels: tuple[str, ...] | None = None
) -> list[CompiledKernel]:
    """The kernels that `forward` launches for shape.tokens on that target, in launch order, or those named.

    Names: router, plan (in place of router, for a routing made elsewhere), scatter, gate_up, down, combine; with
    `configs.backward` those of the backward pass too, which `forward` never launches: grad_pre, grad_x, grad_gate_up,
    grad_down, grad_gate_up_bias, grad_down_bias.
    InputError for a target or configs that cannot be compiled for, MoeccError if the compiler fails.
    """
    return compile_batch([Job(shape=shape, configs=configs, target=target, kernels=kernels)])[0]


def compile_batch(jobs: Sequence[Job]) -> list[list[CompiledKernel]]:
    """`compile_kernels` of each job, in one fresh process.

    A process of its own, because Triton decides at import whether kernels are interpreted (TRITON_INTERPRET) and
    then cannot compile them, and because a crash in LLVM would end ours. Line information is left out: it would
    write the paths of this machine into the assembly.
    """
    for job in jobs:
        _require_compilable(job)
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="moecc-") as cache:
        # A cache of its own: whoever empties the user's while Triton works would break the compilation.
        env = {**inherited, "TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1"}
        process = subprocess.run(
            [sys.executable, "-m", "moecc.codegen.aot_worker"],
            input=pickle.dumps(list(jobs)),
            capture_output=True,
            env=env,
        )
    if process.returncode:
        last = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MoeccError(
            f"the compiler process ended with {process.returncode}: {' '.join(last)}",
            where=", ".join(sorted({job.target for job in jobs})),
        )
    result: list[list[CompiledKernel]] = pickle.loads(process.stdout)
    return result


def _require_compilable(job: Job) -> None:
    target = find_target(job.target)
    if target.backend == "interpret":
        raise InputError("the interpreter compiles nothing", hint="name a target such as sm_90")
    problem = why_invalid(job.configs, job.shape, target)
    if problem:
        raise InputError(problem, where=f"kernel configs for {job.target}")
