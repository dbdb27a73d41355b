"""Triton's signature of a kernel -> what the launcher packs, and how tensor descriptors become plain arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moecc.codegen.x86.abi import ParameterKind
from moecc.codegen.x86.errors import UnsupportedError

Signature = str | tuple["Signature", ...]

_FLOATS = {
    "fp16": ParameterKind.F16,
    "bf16": ParameterKind.BF16,
    "fp32": ParameterKind.F32,
    "fp64": ParameterKind.F64,
    "f16": ParameterKind.F16,
    "f32": ParameterKind.F32,
    "f64": ParameterKind.F64,
}
"""Triton's names, and MLIR's for kernels that come from a file of TTIR."""

_INTEGER = re.compile(r"([iu])(8|16|32|64)$")
_DESCRIPTOR = re.compile(r"tensordesc<([^\[>]*)\[([^\]]*)\]")


class Parameter(NamedTuple):
    """One argument of a launch, `struct parameter` of native/arguments.c."""

    name: str
    kind: ParameterKind
    bits: int = 0
    children: tuple[Parameter, ...] | None = None

    @property
    def slots(self) -> int:
        """Runtime arguments of the compiled kernel that it fills."""
        if self.children is not None:
            return sum(child.slots for child in self.children)
        return int(self.kind != ParameterKind.SKIP)


def make_parameter(name: str, type_: Signature, descriptor_flags: int) -> Parameter:
    """`descriptor_flags`: truth values that this Triton hands over with a descriptor."""
    if isinstance(type_, str) and type_.startswith("tensordesc"):
        type_ = _descriptor_types(type_, descriptor_flags)
    if isinstance(type_, tuple):
        children = tuple(
            make_parameter(f"{name}[{i}]", child, descriptor_flags) for i, child in enumerate(type_)
        )
        return Parameter(name, ParameterKind.TUPLE, 0, children)
    if type_ == "constexpr":
        return Parameter(name, ParameterKind.SKIP)
    if type_.startswith("*"):
        return Parameter(name, ParameterKind.POINTER)
    if type_ in ("i1", "u1"):
        return Parameter(name, ParameterKind.BOOL)
    if type_ in _FLOATS:
        return Parameter(name, _FLOATS[type_])
    integer = _INTEGER.match(type_)
    if integer is None:
        raise UnsupportedError(f"an argument of type {type_} ('{name}')")
    kind = ParameterKind.SIGNED if integer[1] == "i" else ParameterKind.UNSIGNED
    return Parameter(name, kind, int(integer[2]))


def _descriptor_types(type_: str, flags: int) -> tuple[Signature, ...]:
    """Base, sizes, strides and flags, then the sizes and strides once more: the pass that lowers descriptors adds
    the first, and the front end the second."""
    match = _DESCRIPTOR.match(type_)
    if match is None:
        raise UnsupportedError(f"an argument of type {type_}", hint="use a tiled tensor descriptor")
    rank = match[2].count(",") + 1
    return (f"*{match[1]}", *["i64"] * 2 * rank, *["i1"] * flags, *["i32"] * rank, *["i64"] * rank)


Expand = Callable[[Any], Any]


def expander(type_: Signature, flags_of: Callable[[Any], tuple[Any, ...]]) -> Expand | None:
    """Turns the descriptors in an argument into tuples; None for an argument that holds none."""
    if isinstance(type_, str):
        return (lambda value: _descriptor_values(value, flags_of)) if type_.startswith("tensordesc") else None
    parts = [expander(child, flags_of) for child in type_]
    if not any(parts):
        return None
    return lambda values: tuple(_expanded(parts, values))


def _expanded(parts: Iterable[Expand | None], values: Iterable[Any]) -> Iterable[Any]:
    return (value if part is None else part(value) for part, value in zip(parts, values, strict=True))


def _descriptor_values(value: Any, flags_of: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    return (value.base, *value.shape, *value.strides, *flags_of(value), *value.shape, *value.strides)
