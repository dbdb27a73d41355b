"""Compiles a layer's kernels ahead of time, without the device, and reports what they will occupy on it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.backward import backward_constants
from moecc.codegen.config import KernelConfigs, LayerShape, why_invalid
from moecc.codegen.frozen import Constants, kernel_constants, kernel_sequence
from moecc.codegen.resources import Resources
from moecc.codegen.switches import freeze_configs, freeze_layer
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


def job_constants(job: Job) -> dict[str, Constants]:
    """By kernel, in launch order, the constants with which the launcher would launch it: with the dtype and the
    target all that its binary depends on."""
    target, shape = find_target(job.target), job.shape
    layer, config = freeze_layer(shape), freeze_configs(job.configs)
    names = job.kernels or kernel_sequence(config, shape.expert_tokens)
    experts, backend = shape.held_experts, target.backend

    def constants(name: str) -> Constants:
        if name.startswith("grad_"):
            return backward_constants(layer, config, slots=layer.slots, experts=experts, backend=backend)[
                name
            ]
        tables = kernel_constants(
            layer,
            config,
            tokens=shape.tokens if name == "router" else shape.expert_tokens,
            slots=layer.slots,
            experts=experts,
            backend=backend,
            sort=shape.slots is None,
        )
        return tables[name]

    return {name: constants(name) for name in names}


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
