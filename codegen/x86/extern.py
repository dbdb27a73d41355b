"""Functions that kernels name through `triton.language.extra.libdevice`, or through CUDA's of the same meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from moecc.codegen.x86.builder import Builder, V, constant, like
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.math_functions import LIBM, call_math, reciprocal_sqrt

PREFIX = "x86_"
"""Of the symbols of libdevice.py, whatever the type; CUDA's are `__nv_tanhf` and `__nv_tanh`."""


def call_extern(b: Builder, symbol: str, arguments: Sequence[V], result: str) -> V:
    """Of f32, f64 or integers; `result` is the LLVM lane type that integers and truth values are brought to."""
    name = _name(symbol)
    if name in FUNCTIONS:
        value = FUNCTIONS[name](b, *arguments)
    elif name in LIBM:
        value = call_math(b, name, *arguments)
    else:
        hint = "moecc.codegen.x86.libdevice has the functions that are"
        raise UnsupportedError(f"the library function {symbol}", hint=hint)
    return b.cast("zext" if value.lane_type == "i1" else "trunc", value, result) if result == "i32" else value


def _name(symbol: str) -> str:
    if symbol.startswith(PREFIX):
        return symbol.removeprefix(PREFIX)
    name = symbol.removeprefix("__nv_")
    name = _CUDA_NAMES.get(name, name)
    known = name in FUNCTIONS or name in LIBM
    return name if known or symbol == name else name.removesuffix("f")


_CUDA_NAMES = {
    "isnand": "isnan",
    "isinfd": "isinf",
    "isfinited": "isfinite",
    "finitef": "isfinite",
    "signbitd": "signbit",
    "llabs": "iabs",
    "abs": "iabs",
    "clzll": "clz",
    "popcll": "popc",
    "brevll": "brev",
    "ffsll": "ffs",
    "fsqrt_rn": "sqrt",
    "dsqrt_rn": "sqrt",
    "fdiv_rn": "div_rn",
    "ddiv_rn": "div_rn",
    "fast_fdividef": "div_rn",
    "fmaf_rn": "fma",
    "powi": "pow_integer",
    "powif": "pow_integer",
    "fma_rn": "fma",
}
"""Where CUDA's symbol has more than an f behind the name."""


def _intrinsic(name: str) -> Callable[..., V]:
    return lambda b, *arguments: b.intrinsic(name, arguments[0].type, *arguments)


def _libm(name: str) -> Callable[..., V]:
    return lambda b, *arguments: call_math(b, name, *arguments)


def _operation(name: str) -> Callable[..., V]:
    return lambda b, x, y: b.op(name, x, y)


def _flagged(name: str) -> Callable[..., V]:
    return lambda b, x: b.intrinsic(name, x.type, x, V("false", "i1"), overloads=[x.type])


def _number(number: float, x: V) -> V:
    return constant(number, x.lane_type, x.lanes)


def _magnitude(predicate: str) -> Callable[..., V]:
    """Compare |x| to infinity."""
    return lambda b, x: b.compare(
        f"fcmp {predicate}", b.intrinsic("llvm.fabs", x.type, x), _number(math.inf, x)
    )


def _sign_bit(b: Builder, x: V) -> V:
    integer = {"float": "i32", "double": "i64"}[x.lane_type]
    return b.compare("icmp slt", b.cast("bitcast", x, integer), constant(0, integer, x.lanes))


def _saturate(b: Builder, x: V) -> V:
    """To [0, 1]; NaN becomes 0."""
    lower = b.intrinsic("llvm.maxnum", x.type, x, _number(0.0, x))
    return b.intrinsic("llvm.minnum", x.type, lower, _number(1.0, x))


def _first_set(b: Builder, x: V) -> V:
    """Place of the lowest bit set, from 1; 0 of zero."""
    place = b.op("add", _flagged("llvm.cttz")(b, x), _number(1, x))
    return b.select(b.compare("icmp eq", x, _number(0, x)), _number(0, x), place)


def _high(extend: str) -> Callable[..., V]:
    """Upper half of a product."""

    def lower(b: Builder, x: V, y: V) -> V:
        width = int(x.lane_type[1:])
        wide = f"i{2 * width}"
        product = b.op("mul", b.cast(extend, x, wide), b.cast(extend, y, wide))
        return b.cast("trunc", b.op("lshr", product, _number(width, product)), x.lane_type)

    return lower


def _reinterpret(lane_type: str) -> Callable[..., V]:
    return lambda b, x: b.emit(f"bitcast {x.typed} to {like(x, lane_type)}", like(x, lane_type))


def _integer_power(b: Builder, x: V, n: V) -> V:
    """In f64, which holds every i32: its parity gives the sign."""
    power = call_math(b, "pow", b.cast("fpext", x, "double"), b.cast("sitofp", n, "double"))
    return b.cast("fptrunc", power, x.lane_type)


def _normal_cdf(b: Builder, x: V) -> V:
    scaled = b.op("fmul", x, _number(-math.sqrt(0.5), x))
    return b.op("fmul", _number(0.5, x), call_math(b, "erfc", scaled))


FUNCTIONS: dict[str, Callable[..., V]] = {
    "abs": _intrinsic("llvm.fabs"),
    "fabs": _intrinsic("llvm.fabs"),
    "iabs": _flagged("llvm.abs"),
    "floor": _intrinsic("llvm.floor"),
    "ceil": _intrinsic("llvm.ceil"),
    "trunc": _intrinsic("llvm.trunc"),
    "round": _intrinsic("llvm.round"),
    "rint": _intrinsic("llvm.roundeven"),
    "nearbyint": _intrinsic("llvm.roundeven"),
    "sqrt": _intrinsic("llvm.sqrt"),
    "sqrt_rn": _intrinsic("llvm.sqrt"),
    "rsqrt": reciprocal_sqrt,
    "rcp_rn": lambda b, x: b.op("fdiv", _number(1.0, x), x),
    "rcbrt": lambda b, x: b.op("fdiv", _number(1.0, x), call_math(b, "cbrt", x)),
    "fma": _intrinsic("llvm.fma"),
    "copysign": _intrinsic("llvm.copysign"),
    "div_rn": _operation("fdiv"),
    "add_rn": _operation("fadd"),
    "sub_rn": _operation("fsub"),
    "mul_rn": _operation("fmul"),
    "fast_dividef": _operation("fdiv"),
    "fast_expf": _libm("exp"),
    "fast_exp10f": _libm("exp10"),
    "fast_logf": _libm("log"),
    "fast_log2f": _libm("log2"),
    "fast_log10f": _libm("log10"),
    "fast_sinf": _libm("sin"),
    "fast_cosf": _libm("cos"),
    "fast_tanf": _libm("tan"),
    "fast_tanhf": _libm("tanh"),
    "fast_powf": _libm("pow"),
    "pow_integer": _integer_power,
    "normcdf": _normal_cdf,
    "saturatef": _saturate,
    "isnan": lambda b, x: b.compare("fcmp uno", x, x),
    "isinf": _magnitude("oeq"),
    "isfinite": _magnitude("olt"),
    "signbit": _sign_bit,
    "popc": _intrinsic("llvm.ctpop"),
    "clz": _flagged("llvm.ctlz"),
    "ffs": _first_set,
    "brev": _intrinsic("llvm.bitreverse"),
    "mulhi": _high("sext"),
    "umulhi": _high("zext"),
    "mul64hi": _high("sext"),
    "umul64hi": _high("zext"),
    "int_as_float": _reinterpret("float"),
    "float_as_int": _reinterpret("i32"),
    "longlong_as_double": _reinterpret("double"),
    "double_as_longlong": _reinterpret("i64"),
}
"""What is no plain call of libm; the fast ones of CUDA are as exact here as the others."""
