"""Dots compiled alone and called on tensors."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from functools import cache

import torch

from moecc.codegen.x86 import glue
from moecc.codegen.x86.builder import Builder, Module, V
from moecc.codegen.x86.dot import plan_dot
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over, Rows
from moecc.codegen.x86.features import LEVELS, Level


@cache
def request_tiles() -> None:
    """Linux lends the tile registers on request: arch_prctl ARCH_REQ_XCOMP_PERM, feature 18."""
    if ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18):
        raise OSError(ctypes.get_errno(), "the kernel lends no AMX tiles")


def compile_function(
    level: Level, pointers: int, body: Callable[[Builder, Sequence[V]], None]
) -> Callable[..., None]:
    """A function of that many pointers, called with addresses."""
    module = Module()
    b = Builder(module)
    arguments = [V(f"%p{i}", "ptr") for i in range(pointers)]
    body(b, arguments)
    if "tilecfg" in module.globals:
        request_tiles()
        module.declarations.add("declare void @llvm.x86.ldtilecfg(ptr)")
        b.lines.insert(0, "  call void @llvm.x86.ldtilecfg(ptr @tilecfg)")
    b.run("ret void")
    header = f"define void @body({', '.join(argument.typed for argument in arguments)}) #0"
    attributes = (
        f'attributes #0 = {{ "target-cpu"="{level.cpu}" "target-features"="{level.llvm}" '
        f'"prefer-vector-width"="{level.vector_bytes * 8}" }}\n'
    )
    text = module.text() + b.function(header) + attributes
    llvm_ir = glue.optimise(text, "body", ["!llvm.ptr"] * pointers, level.cpu, level.llvm)
    return _load(glue.link(glue.machine_code(llvm_ir, level.cpu, level.llvm)))


def _load(library: bytes) -> Callable[..., None]:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        entry = ctypes.CDLL(file.name).kernel_entry
    entry.restype = None
    return lambda *addresses: entry(*[ctypes.c_void_p(address) for address in addresses])


def aligned(size_bytes: int) -> torch.Tensor:
    """Memory at a multiple of 64 bytes, every byte 0xFF: a NaN in each float format."""
    memory = torch.full((size_bytes + 64,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size_bytes]


class Dot:
    """accumulator += A @ B of one plan, on row-major accumulators."""

    def __init__(self, shape: DotShape, level: str, a_over: Over, b_over: Over) -> None:
        self.plan: DotPlan = plan_dot(shape, LEVELS[level], a_over=a_over, b_over=b_over)
        self.scratch, self.sums = aligned(self.plan.scratch_bytes), aligned(self.plan.accumulator_bytes)
        self.run = compile_function(LEVELS[level], 5, self._body)

    def _body(self, b: Builder, arguments: Sequence[V]) -> None:
        a, b_, rows, sums, scratch = arguments
        shape, plan = self.plan.shape, self.plan
        a_sides, b_sides = (shape.m, shape.k), (shape.n, shape.k)
        a_rows = Rows(a, *(a_sides if plan.a_over == "outer" else a_sides[::-1]), shape.a)
        b_rows = Rows(b_, *(b_sides if plan.b_over == "outer" else b_sides[::-1]), shape.b)
        plan.from_rows(b, rows, sums)
        plan.emit(b, a_rows, b_rows, sums, scratch)
        plan.to_rows(b, sums, rows)

    def __call__(self, a_pointers: torch.Tensor, b_pointers: torch.Tensor, rows: torch.Tensor) -> None:
        """The pointers are i64 addresses of rows; `rows` is [m, n] of the accumulator's element."""
        tensors = (a_pointers, b_pointers, rows, self.sums, self.scratch)
        self.run(*(tensor.data_ptr() for tensor in tensors))
