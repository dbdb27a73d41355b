"""Types of TTIR values and how LLVM spells their elements."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import prod

from moecc.codegen.x86.errors import UnsupportedError

LLVM_TYPES = {
    "f64": "double",
    "f32": "float",
    "f16": "half",
    "bf16": "i16",
    "f8E4M3FN": "i8",
    "f8E5M2": "i8",
    "i64": "i64",
    "i32": "i32",
    "i16": "i16",
    "i8": "i8",
    "i1": "i1",
    "index": "i64",
    "ptr": "ptr",
}
"""Element -> LLVM type of one lane. The 8-bit floats and bf16 travel as their bits: a vector of bfloat that is live in
several blocks is converted lane by lane, by calls that change NaN, unless the CPU computes with the type."""

BYTES = {
    "double": 8,
    "float": 4,
    "half": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "i1": 1,
    "ptr": 8,
}
"""LLVM lane type -> bytes in memory; a truth value takes a whole byte."""


@dataclass(frozen=True)
class Type:
    """A scalar (`shape` None) or a tensor; `pointee` is what a pointer's addresses hold, with its own spelling."""

    element: str
    shape: tuple[int, ...] | None = None
    pointee: str = ""

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of a tensor, () of a scalar."""
        return self.shape or ()

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.dims)

    @property
    def llvm(self) -> str:
        """LLVM's type of one lane."""
        if self.element not in LLVM_TYPES:
            raise UnsupportedError(f"values of type {self.element}")
        return LLVM_TYPES[self.element]

    @property
    def is_float(self) -> bool:
        return self.element[0] == "f" or self.element == "bf16"

    def with_shape(self, shape: tuple[int, ...] | None) -> Type:
        return Type(self.element, shape, self.pointee)

    def __str__(self) -> str:
        element = f"ptr<{self.pointee}>" if self.pointee else self.element
        return f"tensor<{'x'.join(map(str, self.dims))}x{element}>" if self.is_tensor else element


_TENSOR = re.compile(r"tensor<((?:\d+x)*)(.*)>$")
_POINTER = re.compile(r"!tt\.ptr<(.*?)(?:,\s*\d+)?>$")


@cache
def parse_type(text: str) -> Type:
    """`tensor<16x!tt.ptr<f32>>`, `!tt.ptr<i8, 1>`, `bf16`; what is none of these keeps its text as the element."""
    tensor = _TENSOR.match(text)
    if tensor and not tensor[2].startswith("tensor<"):
        return parse_type(tensor[2]).with_shape(tuple(int(size) for size in tensor[1].split("x")[:-1]))
    pointer = _POINTER.match(text)
    if pointer:
        return Type("ptr", pointee=pointer[1])
    return Type(text)


def pointee(type_: Type) -> Type:
    """What a pointer's addresses hold."""
    return parse_type(type_.pointee)


def memory_type(lane: str) -> str:
    """LLVM's type of a lane in memory."""
    return "i8" if lane == "i1" else lane
