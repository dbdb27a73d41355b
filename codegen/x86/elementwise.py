"""Ops that work on every element by itself: arith, math and the conversions of TTIR, on scalars and vectors.

f16, bf16 and the 8-bit floats are computed in f32 and rounded after every op. Only `contract` is allowed of the
shortcuts: a product may be added unrounded, as Triton does unless `enable_fp_fusion` is off. What integers do where
LLVM or x86 leave it undefined is in integer_division. A float out of an integer's range saturates and NaN becomes 0,
as PTX converts. Integers reach f16 and bf16 through f32, as in Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, V, constant
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.extern import call_extern
from moecc.codegen.x86.float_formats import convert, from_single, fused_multiply_add, to_single
from moecc.codegen.x86.integer_division import divide, divide_down, divide_up, remainder, shift
from moecc.codegen.x86.math_functions import LIBM, call_math, reciprocal_sqrt
from moecc.codegen.x86.tree import Op

Lower = Callable[[Builder, Op, list[V]], V]


@dataclass(frozen=True)
class Elementwise:
    """`costly` is what to store rather than evaluate twice."""

    lower: Lower
    costly: bool = False


def lower_elementwise(b: Builder, op: Op, arguments: list[V]) -> V:
    """The op of arguments that are all scalars or all vectors of as many lanes; UnsupportedError without one."""
    try:
        if op.name not in ELEMENTWISE:
            raise UnsupportedError(f"the op {op.name}")
        return ELEMENTWISE[op.name].lower(b, op, arguments)
    except UnsupportedError as error:
        raise error.at(op.location) from None


def _number(number: float, like: V) -> V:
    return constant(number, like.lane_type, like.lanes)


def _element(op: Op) -> str:
    return op.operands[0].type.element


# --- integers


def _integer(name: str) -> Lower:
    return lambda b, op, arguments: b.op(name, *arguments)


def _integer_extreme(name: str) -> Lower:
    return lambda b, op, arguments: b.intrinsic(name, arguments[0].type, *arguments)


def _shift(name: str) -> Lower:
    return lambda b, op, arguments: shift(b, name, *arguments)


def _count_zeros(name: str) -> Lower:
    """Of zero it is the width."""
    return lambda b, op, arguments: b.intrinsic(
        name, arguments[0].type, arguments[0], V("false", "i1"), overloads=[arguments[0].type]
    )


def _divide(signed: bool) -> Lower:
    return lambda b, op, arguments: divide(b, *arguments, signed=signed)


def _remainder(signed: bool) -> Lower:
    return lambda b, op, arguments: remainder(b, *arguments, signed=signed)


_INTEGER_PREDICATES = ("eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge")


def _compare_integers(b: Builder, op: Op, arguments: list[V]) -> V:
    return b.compare(f"icmp {_INTEGER_PREDICATES[op.integer('predicate')]}", *arguments)


def _multiply_high(b: Builder, op: Op, arguments: list[V]) -> V:
    """The upper half of an unsigned product."""
    width = int(arguments[0].lane_type[1:])
    product = b.op("mul", *(b.cast("zext", argument, f"i{2 * width}") for argument in arguments))
    return b.cast("trunc", b.op("lshr", product, _number(width, product)), f"i{width}")


def _cast(name: str) -> Lower:
    return lambda b, op, arguments: b.cast(name, arguments[0], op.result.type.llvm)


def _cast_index(extend: str) -> Lower:
    def lower(b: Builder, op: Op, arguments: list[V]) -> V:
        target = op.result.type.llvm
        shorter = int(target[1:]) < int(arguments[0].lane_type[1:])
        return b.cast("trunc" if shorter else extend, arguments[0], target)

    return lower


def _bitcast(b: Builder, op: Op, arguments: list[V]) -> V:
    return b.cast("bitcast", arguments[0], op.result.type.llvm)


def _select(b: Builder, op: Op, arguments: list[V]) -> V:
    return b.select(*arguments)


# --- floats


def _floats(body: Callable[..., V]) -> Lower:
    """`body` computes in f32 or f64; smaller formats are widened before it and rounded after it."""

    def lower(b: Builder, op: Op, arguments: list[V]) -> V:
        element = _element(op)
        if element == "f64":
            return body(b, *arguments)
        return from_single(b, body(b, *(to_single(b, item, element) for item in arguments)), element)

    return lower


def _fusible(name: str) -> Lower:
    return _floats(lambda b, x, y: b.op(f"{name} contract" if b.module.fuse else name, x, y))


def _float_op(name: str) -> Lower:
    return _floats(lambda b, x, y: b.op(name, x, y))


def _float_intrinsic(name: str) -> Lower:
    return _floats(lambda b, *arguments: b.intrinsic(name, arguments[0].type, *arguments))


def _function(name: str) -> Lower:
    return _floats(lambda b, *arguments: call_math(b, name, *arguments))


def _change_sign(flip: bool) -> Lower:
    """Of the sign bit alone, so that NaN keeps its payload; the 16-bit formats have no instruction for it."""

    def lower(b: Builder, op: Op, arguments: list[V]) -> V:
        (value,) = arguments
        if _element(op) not in ("f16", "bf16"):
            negated = f"fneg {value.typed}"
            return b.emit(negated, value.type) if flip else b.intrinsic("llvm.fabs", value.type, value)
        bits = b.cast("bitcast", value, "i16")
        changed = (
            b.op("xor", bits, _number(0x8000, bits)) if flip else b.op("and", bits, _number(0x7FFF, bits))
        )
        return b.cast("bitcast", changed, value.lane_type)

    return lower


_FLOAT_PREDICATES = (
    "false", "oeq", "ogt", "oge", "olt", "ole", "one", "ord", "ueq", "ugt", "uge", "ult", "ule", "une", "uno", "true",
)  # fmt: skip


def _compare_floats(b: Builder, op: Op, arguments: list[V]) -> V:
    element = _element(op)
    if element != "f64":
        arguments = [to_single(b, argument, element) for argument in arguments]
    return b.compare(f"fcmp {_FLOAT_PREDICATES[op.integer('predicate')]}", *arguments)


def _fma(b: Builder, op: Op, arguments: list[V]) -> V:
    element = _element(op)
    if element in ("f32", "f64"):
        return b.intrinsic("llvm.fma", arguments[0].type, *arguments)
    x, y, z = arguments
    return fused_multiply_add(b, x, y, z, element)


def _clamp(b: Builder, op: Op, arguments: list[V]) -> V:
    """Of NaN it is NaN if that is to be propagated, else the lower bound."""
    upper, lower = ("minimum", "maximum") if op.integer("propagateNan", 0) else ("minnum", "maxnum")

    def body(b: Builder, x: V, low: V, high: V) -> V:
        return b.intrinsic(f"llvm.{upper}", x.type, b.intrinsic(f"llvm.{lower}", x.type, x, low), high)

    return _floats(body)(b, op, arguments)


# --- between integers and floats, and between floats


def _to_float(name: str) -> Lower:
    def lower(b: Builder, op: Op, arguments: list[V]) -> V:
        target = op.result.type.element
        if target == "f64":
            return b.cast(name, arguments[0], "double")
        return from_single(b, b.cast(name, arguments[0], "float"), target)

    return lower


def _to_integer(signed: bool) -> Lower:
    """A conversion out of range is poison in LLVM; a selection of another value does not carry it on."""

    def lower(b: Builder, op: Op, arguments: list[V]) -> V:
        element, target = _element(op), op.result.type.llvm
        x = arguments[0] if element == "f64" else to_single(b, arguments[0], element)
        magnitude = int(target[1:]) - signed
        low = -(2**magnitude) if signed else 0
        inside = b.cast("fptosi" if signed else "fptoui", x, target)
        above = b.compare("fcmp oge", x, _number(2.0**magnitude, x))
        below = b.compare("fcmp olt", x, _number(low, x))
        bounded = b.select(above, _number(2**magnitude - 1, inside), inside)
        bounded = b.select(below, _number(low, inside), bounded)
        return b.select(b.compare("fcmp uno", x, x), _number(0, inside), bounded)

    return lower


def _convert(b: Builder, op: Op, arguments: list[V]) -> V:
    """The attribute `rounding` of tt.fp_to_fp is 0 toward zero and 1 to nearest even."""
    toward_zero = op.integer("rounding", 1) == 0
    return convert(b, arguments[0], _element(op), op.result.type.element, toward_zero=toward_zero)


def _extern(b: Builder, op: Op, arguments: list[V]) -> V:
    elements = [operand.type.element for operand in op.operands]
    small = any(element in ("f16", "bf16") for element in elements)
    widened = [
        to_single(b, value, element) if element in ("f16", "bf16") else value
        for value, element in zip(arguments, elements, strict=True)
    ]
    result = call_extern(b, op.text("symbol"), widened, op.result.type.llvm)
    return from_single(b, result, op.result.type.element) if small and op.result.type.is_float else result


def _inline_assembly(b: Builder, op: Op, arguments: list[V]) -> V:
    raise UnsupportedError(
        "inline assembly", hint="write the op with tl or libdevice functions: its text is for a GPU"
    )


_CHEAP: dict[str, Lower] = {
    "arith.addi": _integer("add"),
    "arith.subi": _integer("sub"),
    "arith.muli": _integer("mul"),
    "arith.andi": _integer("and"),
    "arith.ori": _integer("or"),
    "arith.xori": _integer("xor"),
    "arith.shli": _shift("shl"),
    "arith.shrsi": _shift("ashr"),
    "arith.shrui": _shift("lshr"),
    "arith.maxsi": _integer_extreme("llvm.smax"),
    "arith.minsi": _integer_extreme("llvm.smin"),
    "arith.maxui": _integer_extreme("llvm.umax"),
    "arith.minui": _integer_extreme("llvm.umin"),
    "arith.cmpi": _compare_integers,
    "arith.cmpf": _compare_floats,
    "arith.select": _select,
    "arith.addf": _fusible("fadd"),
    "arith.subf": _fusible("fsub"),
    "arith.mulf": _fusible("fmul"),
    "arith.negf": _change_sign(flip=True),
    "arith.maxnumf": _float_intrinsic("llvm.maxnum"),
    "arith.minnumf": _float_intrinsic("llvm.minnum"),
    "arith.maximumf": _float_intrinsic("llvm.maximum"),
    "arith.minimumf": _float_intrinsic("llvm.minimum"),
    "arith.extf": _convert,
    "arith.truncf": _convert,
    "arith.extsi": _cast("sext"),
    "arith.extui": _cast("zext"),
    "arith.trunci": _cast("trunc"),
    "arith.sitofp": _to_float("sitofp"),
    "arith.uitofp": _to_float("uitofp"),
    "arith.fptosi": _to_integer(signed=True),
    "arith.fptoui": _to_integer(signed=False),
    "arith.bitcast": _bitcast,
    "arith.index_cast": _cast_index("sext"),
    "arith.index_castui": _cast_index("zext"),
    "math.absf": _change_sign(flip=False),
    "math.absi": lambda b, op, arguments: b.intrinsic(
        "llvm.abs", arguments[0].type, arguments[0], V("false", "i1"), overloads=[arguments[0].type]
    ),
    "math.floor": _float_intrinsic("llvm.floor"),
    "math.ceil": _float_intrinsic("llvm.ceil"),
    "math.trunc": _float_intrinsic("llvm.trunc"),
    "math.round": _float_intrinsic("llvm.round"),
    "math.roundeven": _float_intrinsic("llvm.roundeven"),
    "math.copysign": _float_intrinsic("llvm.copysign"),
    "math.fma": _fma,
    "math.ctpop": _integer_extreme("llvm.ctpop"),
    "math.ctlz": _count_zeros("llvm.ctlz"),
    "math.cttz": _count_zeros("llvm.cttz"),
    "tt.fp_to_fp": _convert,
    "tt.bitcast": _bitcast,
    "tt.int_to_ptr": _cast("inttoptr"),
    "tt.ptr_to_int": _cast("ptrtoint"),
    "tt.mulhiui": _multiply_high,
    "tt.clampf": _clamp,
    "tt.elementwise_inline_asm": _inline_assembly,
}

_MATH_OPS = {"powf": "pow"} | {name: name for name in LIBM if name != "pow"}
"""Op of the math dialect -> function of libm."""

_COSTLY: dict[str, Lower] = {
    "arith.divsi": _divide(signed=True),
    "arith.divui": _divide(signed=False),
    "arith.remsi": _remainder(signed=True),
    "arith.remui": _remainder(signed=False),
    "arith.floordivsi": lambda b, op, arguments: divide_down(b, *arguments),
    "arith.ceildivsi": lambda b, op, arguments: divide_up(b, *arguments),
    "arith.divf": _float_op("fdiv"),
    "arith.remf": _float_op("frem"),
    "math.sqrt": _float_intrinsic("llvm.sqrt"),
    "math.rsqrt": _floats(reciprocal_sqrt),
    "tt.precise_sqrt": _float_intrinsic("llvm.sqrt"),
    "tt.precise_divf": _float_op("fdiv"),
    "tt.extern_elementwise": _extern,
    **{f"math.{op}": _function(name) for op, name in _MATH_OPS.items()},
}

ELEMENTWISE: dict[str, Elementwise] = {
    **{name: Elementwise(lower) for name, lower in _CHEAP.items()},
    **{name: Elementwise(lower, costly=True) for name, lower in _COSTLY.items()},
}
"""Op -> how it is lowered."""
