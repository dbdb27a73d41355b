"""Division and shifts of integers where every argument has a result: x86 traps on some, LLVM leaves them undefined.

x / 0 is all ones and x % 0 is x, so that x == x / y * y + x % y always; PTX leaves both to the machine. The least
number divided by -1 wraps to itself. A shift by the width or more moves all bits out, as PTX clamps its shifts.
"""

from __future__ import annotations

from moecc.codegen.x86.builder import Builder, V, constant


def divide(b: Builder, x: V, y: V, *, signed: bool) -> V:
    """Toward zero."""
    name = "sdiv" if signed else "udiv"
    if _is_harmless(y):
        return b.op(name, x, y)
    is_zero = b.compare("icmp eq", y, _number(0, y))
    unsafe = b.op("or", is_zero, _overflows(b, x, y)) if signed else is_zero
    safe = b.select(unsafe, _number(1, y), y)
    quotient = _through_floats(b, x, safe, signed) if _fits_floats(y) else b.op(name, x, safe)
    return b.select(is_zero, _number(-1, y), quotient)


def remainder(b: Builder, x: V, y: V, *, signed: bool) -> V:
    """Of the sign of x."""
    if _is_harmless(y):
        return b.op("srem" if signed else "urem", x, y)
    return _rest(b, x, y, divide(b, x, y, signed=signed))


def divide_down(b: Builder, x: V, y: V) -> V:
    return _divide_toward(b, x, y, -1)


def divide_up(b: Builder, x: V, y: V) -> V:
    return _divide_toward(b, x, y, 1)


def _divide_toward(b: Builder, x: V, y: V, step: int) -> V:
    """The quotient, moved by step where it was cut off on the other side: below zero going down, above going up."""
    quotient = divide(b, x, y, signed=True)
    rest = _rest(b, x, y, quotient)
    zero = _number(0, x)
    is_negative = b.compare("icmp slt", b.op("xor", x, y), zero)
    side = is_negative if step < 0 else b.op("xor", is_negative, constant(1, "i1", x.lanes))
    moves = b.op("and", side, b.compare("icmp ne", rest, zero))
    is_zero = b.compare("icmp eq", y, zero)
    moved = b.select(moves, b.op("add", quotient, _number(step, x)), quotient)
    return b.select(is_zero, quotient, moved)


def shift(b: Builder, name: str, x: V, amount: V) -> V:
    """`name` is shl, lshr or ashr."""
    width = int(x.lane_type[1:])
    if name == "ashr":
        return b.op(name, x, b.intrinsic("llvm.umin", x.type, amount, _number(width - 1, x)))
    inside = b.compare("icmp ult", amount, _number(width, x))
    return b.select(inside, b.op(name, x, amount), _number(0, x))


def _rest(b: Builder, x: V, y: V, quotient: V) -> V:
    return b.op("sub", x, b.op("mul", quotient, y))


def _number(number: int, x: V) -> V:
    return constant(number, x.lane_type, x.lanes)


def _is_harmless(y: V) -> bool:
    """A constant that is neither 0 nor -1: LLVM multiplies instead of dividing."""
    text = y.name.removeprefix(f"splat ({y.lane_type} ").removesuffix(")")
    return text.lstrip("-").isdigit() and int(text) not in (0, -1)


def _overflows(b: Builder, x: V, y: V) -> V:
    least = _number(-(1 << (int(x.lane_type[1:]) - 1)), x)
    return b.op("and", b.compare("icmp eq", x, least), b.compare("icmp eq", y, _number(-1, y)))


def _fits_floats(y: V) -> bool:
    """Vectors have no integer division; a float quotient cut off is exact if the float holds both numbers."""
    return y.lanes > 1 and y.lane_type != "i64"


def _through_floats(b: Builder, x: V, y: V, signed: bool) -> V:
    lane_type = "double" if x.lane_type == "i32" else "float"
    to_float, to_integer = ("sitofp", "fptosi") if signed else ("uitofp", "fptoui")
    quotient = b.op("fdiv", b.cast(to_float, x, lane_type), b.cast(to_float, y, lane_type))
    return b.cast(to_integer, quotient, x.lane_type)
