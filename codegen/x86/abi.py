"""What Python, generated code and the launcher agree on; native/ has the same numbers."""

from __future__ import annotations

from enum import IntEnum

from moecc.codegen.x86.types import Type


class ParameterKind(IntEnum):
    """How the launcher packs an argument, `enum kind` of native/arguments.c."""

    SKIP = 0
    TUPLE = 1
    POINTER = 2
    BOOL = 3
    SIGNED = 4
    UNSIGNED = 5
    F16 = 6
    BF16 = 7
    F32 = 8
    F64 = 9


class PrintKind(IntEnum):
    """What `print` of `struct runtime` is handed, `enum print_kind` of native/print.c."""

    U1 = 0
    I8 = 1
    U8 = 2
    I16 = 3
    U16 = 4
    I32 = 5
    U32 = 6
    I64 = 7
    U64 = 8
    F16 = 9
    BF16 = 10
    F32 = 11
    F64 = 12
    F8E4M3FN = 13
    F8E5M2 = 14
    POINTER = 15


def print_kind(type_: Type, *, signed: bool) -> PrintKind:
    """For tiles and scalars of that element."""
    if type_.element == "ptr":
        return PrintKind.POINTER
    if type_.is_float:
        return PrintKind[type_.element.upper()]
    width = type_.llvm.removeprefix("i")
    return PrintKind[f"{'I' if signed and width != '1' else 'U'}{width}"]


def print_prefix(prefix: str, shape: tuple[int, ...]) -> str:
    """The `prefix` for `print`: it leads with the tile's sizes, so that lines can tell an element's index."""
    return "x".join(map(str, shape)) + "|" + prefix
