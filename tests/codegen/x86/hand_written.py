"""Kernels whose LLVM IR is written by hand: what surrounds the lowering is tested apart from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

from moecc.codegen.x86.features import Level

ENTRY = "define void @{name}(ptr %args, i64 %first, i64 %last, i32 %g0, i32 %g1, i32 %g2, ptr %runtime) #0"
ATTRIBUTES = 'attributes #0 = {{ nounwind "target-cpu"="{cpu}" }}\n'

ADD = """ {
entry:
  %px = load ptr, ptr %args
  %sy = getelementptr i64, ptr %args, i64 1
  %py = load ptr, ptr %sy
  %so = getelementptr i64, ptr %args, i64 2
  %po = load ptr, ptr %so
  %sn = getelementptr i64, ptr %args, i64 3
  %n = load i32, ptr %sn
  %limit = sext i32 %n to i64
  %low = mul i64 %first, 128
  %all = mul i64 %last, 128
  %high = call i64 @llvm.smin.i64(i64 %all, i64 %limit)
  br label %head
head:
  %i = phi i64 [%low, %entry], [%next, %body]
  %more = icmp slt i64 %i, %high
  br i1 %more, label %body, label %done
body:
  %ax = getelementptr float, ptr %px, i64 %i
  %ay = getelementptr float, ptr %py, i64 %i
  %ao = getelementptr float, ptr %po, i64 %i
  %x = load float, ptr %ax
  %y = load float, ptr %ay
  %sum = fadd float %x, %y
  store float %sum, ptr %ao
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
declare i64 @llvm.smin.i64(i64, i64)
"""
"""vadd(x, y, o, n) of 128 elements a program."""

COPY = """ {
  %out = load ptr, ptr %args
  call void @llvm.memcpy.p0.p0.i64(ptr %out, ptr %args, i64 BYTES, i1 false)
  ret void
}
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""
"""Copies the slots to what the first points at."""


@dataclass(frozen=True)
class Lowered:
    name: str
    llvm_ir: str
    arena_bytes: int = 0
    spins: bool = False


def module(name: str, body: str) -> ModuleType:
    """In place of the lowering: always that body. `texts` are the TTIR that it was asked to lower."""
    here = ModuleType("moecc.codegen.x86.lower")
    texts: list[str] = []

    def lower_kernel(text: str, level: Level, *, fuse: bool) -> Lowered:
        texts.append(text)
        return Lowered(name, ENTRY.format(name=name) + body + ATTRIBUTES.format(cpu=level.cpu))

    contents = {
        "ENTRY_SIGNATURE": ("!llvm.ptr", "i64", "i64", "i32", "i32", "i32", "!llvm.ptr"),
        "lower_kernel": lower_kernel,
        "texts": texts,
    }
    vars(here).update(contents)
    return here


def install(name: str, body: str) -> ModuleType:
    """For a process of its own."""
    sys.modules["moecc.codegen.x86.lower"] = module(name, body)
    return sys.modules["moecc.codegen.x86.lower"]
