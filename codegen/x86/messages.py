"""tl.device_assert and tl.device_print: calls of what `struct runtime` points to."""

from __future__ import annotations

import re

from moecc.codegen.x86.abi import print_kind, print_prefix
from moecc.codegen.x86.builder import V, constant
from moecc.codegen.x86.dots import all_true
from moecc.codegen.x86.evaluate import stored
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Op
from moecc.codegen.x86.types import Type

_FAIL, _PRINT = 1, 2
"""Places in `struct runtime`, in pointers."""

_RUNTIME = V("%runtime", "ptr")


def _assert(frame: Frame, op: Op) -> None:
    """A false element ends the program; the message says where."""
    message = f"{op.location}: assertion failed: {unescape(op.text('message'))}"

    def fail() -> tuple[()]:
        _call_runtime(frame, _FAIL, _text(frame, message))
        return ()

    frame.b.choose(all_true(frame, op.operands[0]), tuple, fail, likely=True)


def _print(frame: Frame, op: Op) -> None:
    """The prefix with every operand; alone where there is none."""
    prefix, base = unescape(op.text("prefix")), constant(op.attributes.get("hex") is True, "i32")
    if not op.operands:
        _print_values(frame, print_prefix(prefix, ()), V("null", "ptr"), Type("i32"), 0, base, signed=True)
    for operand, signed in zip(op.operands, op.integers("isSigned"), strict=True):
        if operand.type.is_tensor:
            data = stored(frame, operand).buffer
        else:
            data = frame.b.allocate(operand.type.llvm, 1)
            frame.b.store(frame.scalars[operand], data)
        text = print_prefix(prefix, operand.type.dims)
        _print_values(frame, text, data, operand.type, operand.type.size, base, signed=signed != 0)


def _print_values(
    frame: Frame, prefix: str, data: V, type_: Type, count: int, base: V, *, signed: bool
) -> None:
    kind = constant(print_kind(type_, signed=signed), "i32")
    _call_runtime(frame, _PRINT, _text(frame, prefix), data, constant(count, "i64"), kind, base)


def _call_runtime(frame: Frame, place: int, *arguments: V) -> None:
    b = frame.b
    function = b.load("ptr", b.address(_RUNTIME, place, "ptr"))
    listed = ", ".join(argument.typed for argument in (_RUNTIME, *arguments))
    b.run(f"call void {function}({listed})")


def _text(frame: Frame, text: str) -> V:
    """A constant that ends in a zero byte."""
    data = text.encode() + b"\0"
    name = f"@text.{len(frame.b.module.globals)}"
    escaped = "".join(f"\\{byte:02X}" for byte in data)
    frame.b.module.globals[name] = f'{name} = private constant [{len(data)} x i8] c"{escaped}"'
    return V(name, "ptr")


def unescape(text: str) -> str:
    """A string as MLIR prints it: bytes that cannot be printed, and quotes, as a backslash and two digits."""
    plain = re.sub(
        rb"\\(\\|[0-9A-Fa-f]{2}|[nt\"])",
        lambda match: _ESCAPES.get(match[1]) or bytes.fromhex(match[1].decode()),
        text.encode(),
    )
    return plain.decode(errors="replace")


_ESCAPES = {b"\\": b"\\", b"n": b"\n", b"t": b"\t", b'"': b'"'}

RULES: dict[str, Rule] = {"tt.assert": _assert, "tt.print": _print}
