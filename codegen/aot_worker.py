"""The process in which kernels are compiled: pickled jobs on stdin, pickled compiled kernels on stdout."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moecc.codegen.aot import CompiledKernel, Job, job_constants
from moecc.codegen.frozen import Constants
from moecc.codegen.kernels.down import combine_kernel, down_kernel
from moecc.codegen.kernels.gate_up import gate_up_kernel
from moecc.codegen.kernels.grad_pre import grad_pre_kernel
from moecc.codegen.kernels.grad_weights import grad_bias_kernel, grad_weights_kernel
from moecc.codegen.kernels.plan import plan_kernel, scatter_kernel
from moecc.codegen.kernels.router import router_kernel
from moecc.codegen.resources import read_resources, read_x86_resources
from moecc.codegen.targets import Target, find_target

KERNELS = {
    "router": router_kernel,
    "plan": plan_kernel,
    "scatter": scatter_kernel,
    "gate_up": gate_up_kernel,
    "down": down_kernel,
    "combine": combine_kernel,
    "grad_pre": grad_pre_kernel,
    "grad_x": down_kernel,
    "grad_gate_up": grad_weights_kernel,
    "grad_down": grad_weights_kernel,
    "grad_gate_up_bias": grad_bias_kernel,
    "grad_down_bias": grad_bias_kernel,
}
SUFFIXES = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco"), "x86": ("s", "so")}
TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FLOAT32_POINTERS = {"topk_weights_ptr", "logits_ptr", "correction_bias_ptr", "weight_parts_ptr"}
FLOAT_POINTERS = {
    "x_ptr",
    "gate_ptr",
    "gate_up_ptr",
    "down_ptr",
    "h_ptr",
    "pre_ptr",
    "grad_out_ptr",
    "grad_pre_ptr",
    "weighted_h_ptr",
    "left_ptr",
    "right_ptr",
    "grad_ptr",
    "values_ptr",
    "partial_ptr",
    "residual_ptr",
    "out_ptr",
    "router_bias_ptr",
    "gate_up_bias_ptr",
    "down_bias_ptr",
}


def compile_job(job: Job) -> list[CompiledKernel]:
    """Every kernel of the job, with the constants with which the launcher would launch it."""
    target = find_target(job.target)
    return [_compile(name, table, job.shape.dtype, target) for name, table in job_constants(job).items()]


def _compile(name: str, constants: Constants, dtype: str, target: Target) -> CompiledKernel:
    kernel = KERNELS[name]
    constants = dict(constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = {
        argument: "constexpr" if argument in constants else _argument_type(argument, dtype)
        for argument in kernel.arg_names
    }
    # Tensors of torch start at multiples of 16 bytes; without that fact loads are scalar and never asynchronous.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr")
    }
    compiled: Any = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=options,
    )
    suffixes = SUFFIXES[target.backend]
    binary = compiled.asm[suffixes[1]]
    assembly = _x86_assembly(compiled, target) if target.backend == "x86" else compiled.asm[suffixes[0]]
    return CompiledKernel(
        name=name,
        target=target.name,
        assembly=assembly,
        assembly_suffix=suffixes[0],
        binary=binary,
        binary_suffix=suffixes[1],
        resources=read_x86_resources(assembly, arena_bytes=compiled.metadata.arena_bytes)
        if target.backend == "x86"
        else read_resources(
            assembly, binary, shared_bytes=compiled.metadata.shared, num_warps=compiled.metadata.num_warps
        ),
    )


def _x86_assembly(compiled: Any, target: Target) -> str:
    from moecc.codegen.x86.features import LEVELS
    from moecc.codegen.x86.glue import machine_code

    level = LEVELS[str(target.arch)]
    return str(machine_code(compiled.asm["llir"], level.cpu, level.llvm, assembly=True))


def _argument_type(argument: str, dtype: str) -> str:
    if argument in FLOAT32_POINTERS:
        return "*fp32"
    if argument in FLOAT_POINTERS:
        return f"*{TRITON_TYPES[dtype]}"
    return "*i32" if argument.endswith("_ptr") else "i32"


if __name__ == "__main__":
    results = [compile_job(job) for job in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(results))
