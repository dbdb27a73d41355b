"""Transcendental functions: polynomials in f32 on all lanes at once, libm lane by lane for f64 and the rare ones.

Every function of f32 here is within 2 units in the last place over all arguments, infinities, NaN and subnormal
numbers included. The polynomials were fitted for this file: on 1500 Chebyshev nodes of the reduced range, with values
of 25 digits, a weighted least-squares fit is repeated with weights multiplied by its errors (Lawson's iteration, which
tends to the minimax fit); the lowest coefficient is rounded to f32, and the others are fitted again to what remains.
The relative error given with each is that of the rounded coefficients. Reductions follow Cody and Waite, "Software
Manual for the Elementary Functions", 1980: fused multiply-adds of a constant in two parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from moecc.codegen.x86.builder import Builder, V, constant, suffix

LIBM = frozenset(
    (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf", "erfc", "exp",
        "exp10", "exp2", "expm1", "fdim", "fmod", "hypot", "j0", "j1", "ldexp", "lgamma", "log", "log10", "log1p",
        "log2", "nextafter", "pow", "remainder", "sin", "sinh", "tan", "tanh", "tgamma", "y0", "y1",
    )
)  # fmt: skip
"""Functions of libm that can be called; those of f32 have an f behind their names there."""


def call_math(b: Builder, name: str, *arguments: V) -> V:
    """A function of LIBM on f32 or f64; a result of the first argument's type."""
    first = arguments[0]
    if first.lane_type == "float" and name in SINGLE:
        return _call(b, f"x86.{name}", first.type, arguments, SINGLE[name], "alwaysinline")
    symbol = name + "f" if first.lane_type == "float" else name
    return _call(b, f"x86.libm.{symbol}", first.type, arguments, _by_lane(symbol), "noinline")


def reciprocal_sqrt(b: Builder, x: V) -> V:
    return b.op("fdiv", constant(1.0, x.lane_type, x.lanes), b.intrinsic("llvm.sqrt", x.type, x))


def _call(
    b: Builder, name: str, result: str, arguments: Sequence[V], body: Callable[..., V], attribute: str
) -> V:
    """Call a function of this module, which `body` writes at its first use."""
    symbol = f"{name}.{suffix(result)}"
    if symbol not in b.module.functions:
        inner = Builder(b.module)
        parameters = [V(f"%a{i}", argument.type) for i, argument in enumerate(arguments)]
        value = body(inner, *parameters)
        inner.run(f"ret {value.typed}")
        types = ", ".join(parameter.typed for parameter in parameters)
        header = f"define internal {result} @{symbol}({types}) {attribute} #0"
        b.module.functions[symbol] = inner.function(header)
    return b.call(symbol, result, *arguments, declare=False)


def _by_lane(symbol: str) -> Callable[..., V]:
    def body(b: Builder, *arguments: V) -> V:
        first = arguments[0]
        if not first.lanes:
            return b.call(symbol, first.type, *arguments)
        result = V("poison", first.type)
        for lane in range(first.lanes):
            items = [b.extract(argument, lane) for argument in arguments]
            result = b.insert(result, b.call(symbol, first.lane_type, *items), lane)
        return result

    return body


def _number(number: float, x: V) -> V:
    return constant(number, x.lane_type, x.lanes)


def _fma(b: Builder, x: V, y: V | float, z: V | float) -> V:
    y, z = (item if isinstance(item, V) else _number(item, x) for item in (y, z))
    return b.intrinsic("llvm.fma", x.type, x, y, z)


def _polynomial(b: Builder, x: V, coefficients: Sequence[float]) -> V:
    """c[0] + c[1] x + c[2] x**2 + …"""
    total = _number(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        total = _fma(b, total, x, coefficient)
    return total


def _at_most(b: Builder, x: V, bound: float) -> V:
    """The smaller one; NaN stays."""
    limit = _number(bound, x)
    return b.select(b.compare("fcmp ogt", x, limit), limit, x)


def _at_least(b: Builder, x: V, bound: float) -> V:
    limit = _number(bound, x)
    return b.select(b.compare("fcmp olt", x, limit), limit, x)


def _integer(b: Builder, name: str, bits: V, number: int) -> V:
    return b.op(name, bits, constant(number, bits.lane_type, bits.lanes))


_ROUND = 1.5 * 2**23
_ROUND_BITS = 0x4B400000
_LN2 = 0.693147182464599609375
_LN2_LOW = math.log(2) - _LN2
"""log(2) is _LN2, an f32, and the rest."""


def _nearest(b: Builder, x: V, factor: float) -> tuple[V, V]:
    """x * factor rounded to an integer, |that| < 2**22, as a float and as i32; adding 1.5 * 2**23 rounds.

    Unlike a conversion it gives some integer for NaN too, so that NaN reaches the result through the float.
    """
    shifted = _fma(b, x, factor, _ROUND)
    bits = b.cast("bitcast", shifted, "i32")
    return b.op("fsub", shifted, _number(_ROUND, x)), _integer(b, "sub", bits, _ROUND_BITS)


def _power_of_two(b: Builder, n: V) -> V:
    """2**n as f32, -126 <= n <= 127."""
    return b.cast("bitcast", _integer(b, "shl", _integer(b, "add", n, 127), 23), "float")


def _scale(b: Builder, x: V, rounded: V, n: V) -> V:
    """x * 2**n, |n| <= 252, rounded once: in two factors where no instruction does it. `rounded` is n as a float."""
    bits = 32 * x.lanes
    if b.module.avx512 and bits in (128, 256, 512):
        mask, mode = V("-1", "i16" if bits == 512 else "i8"), [V("4", "i32")] if bits == 512 else []
        return b.intrinsic(
            f"llvm.x86.avx512.mask.scalef.ps.{bits}", x.type, x, rounded, x, mask, *mode, overloads=()
        )
    half = _integer(b, "ashr", n, 1)
    once = b.op("fmul", x, _power_of_two(b, half))
    return b.op("fmul", once, _power_of_two(b, b.op("sub", n, half)))


_EXP = (0.5, 0.166665211, 0.0416663885, 0.00836867932, 0.0013941878)
"""(exp(r) - 1 - r) / r**2, |r| <= log(2) / 2; error 2**-28."""


def _exp(b: Builder, x: V) -> V:
    return _exp_bounded(b, _at_least(b, _at_most(b, x, 89.0), -104.0))


def _exp_bounded(b: Builder, x: V) -> V:
    """exp, -104 <= x <= 89: from there on it is 0 and infinite."""
    rounded, n = _nearest(b, x, math.log2(math.e))
    rest = _fma(b, rounded, -_LN2_LOW, _fma(b, rounded, -_LN2, x))
    square = b.op("fmul", rest, rest)
    power = b.op("fadd", _fma(b, square, _polynomial(b, rest, _EXP), rest), _number(1.0, x))
    return _scale(b, power, rounded, n)


_EXP2 = (1.0, 0.693147182, 0.240226507, 0.0555035956, 0.00961806253, 0.00133909844, 0.000154628826)
"""2**f, |f| <= 1/2; error 2**-28."""


def _exp2(b: Builder, x: V) -> V:
    bounded = _at_least(b, _at_most(b, x, 129.0), -151.0)
    rounded, n = _nearest(b, bounded, 1.0)
    return _scale(b, _polynomial(b, b.op("fsub", bounded, rounded), _EXP2), rounded, n)


def _significand(b: Builder, x: V) -> tuple[V, V]:
    """f and e of x = (1 + f) * 2**e, |f| <= 1/3, for positive numbers, subnormal ones among them."""
    is_tiny = b.compare("fcmp olt", x, _number(2.0**-126, x))
    scaled = b.select(is_tiny, b.op("fmul", x, _number(2.0**23, x)), x)
    bits = b.cast("bitcast", scaled, "i32")
    exponent = _integer(b, "ashr", _integer(b, "sub", bits, 0x3F2AAAAB), 23)
    one = b.cast("bitcast", b.op("sub", bits, _integer(b, "shl", exponent, 23)), "float")
    whole = b.cast("sitofp", exponent, "float")
    shift = b.select(is_tiny, _number(-23.0, x), _number(0.0, x))
    return b.op("fsub", one, _number(1.0, x)), b.op("fadd", whole, shift)


def _log_edges(b: Builder, x: V, inside: V) -> V:
    """What a logarithm is at infinity, zero, negative numbers and NaN."""
    infinity = _number(math.inf, x)
    upper = b.select(b.compare("fcmp olt", x, infinity), inside, x)
    zero = _number(0.0, x)
    lower = b.select(b.compare("fcmp olt", x, zero), _number(math.nan, x), upper)
    return b.select(b.compare("fcmp oeq", x, zero), _number(-math.inf, x), lower)


_LOG = (
    0.333332241, -0.249996886, 0.200100332, -0.166854724, 0.140110761, -0.121150501, 0.139617473, -0.131919414,
)  # fmt: skip
"""(log(1 + f) - f + f**2 / 2) / f**3, |f| <= 1/3; error 2**-27 of f."""


def _log(b: Builder, x: V) -> V:
    f, exponent = _significand(b, x)
    square = b.op("fmul", f, f)
    tail = b.op("fmul", b.op("fmul", square, f), _polynomial(b, f, _LOG))
    tail = _fma(b, exponent, _LN2_LOW, _fma(b, square, -0.5, tail))
    return _log_edges(b, x, _fma(b, exponent, _LN2, b.op("fadd", f, tail)))


_LOG2E = 1.44269502162933349609375
_LOG2E_LOW = math.log2(math.e) - _LOG2E
_LOG2 = (
    -0.72134757, 0.480896622, -0.360666066, 0.288690686, -0.240789935, 0.202039629, -0.174159229, 0.201852113,
    -0.192315087,
)  # fmt: skip
"""(log2(1 + f) - log2(e) f) / f**2, |f| <= 1/3; error 2**-27 of f."""


def _log2(b: Builder, x: V) -> V:
    f, exponent = _significand(b, x)
    tail = b.op("fmul", b.op("fmul", f, f), _polynomial(b, f, _LOG2))
    near_one = _fma(b, f, _LOG2E, _fma(b, f, _LOG2E_LOW, tail))
    return _log_edges(b, x, b.op("fadd", exponent, near_one))


_TANH = (-0.333332837, 0.133314848, -0.0537430048, 0.0206491034, -0.00571549917)
"""(tanh(x) - x) / x**3 in powers of x**2, |x| <= 5/8; error 2**-27 of x."""


def _tanh(b: Builder, x: V) -> V:
    """A polynomial up to 5/8, from there 1 - 2 / (exp(2 |x|) + 1)."""
    magnitude = b.intrinsic("llvm.fabs", x.type, x)
    square = b.op("fmul", x, x)
    below = _fma(b, b.op("fmul", square, x), _polynomial(b, square, _TANH), x)
    bounded = _at_most(b, magnitude, 10.0)
    power = _exp_bounded(b, b.op("fadd", bounded, bounded))
    quotient = b.op("fdiv", _number(2.0, x), b.op("fadd", power, _number(1.0, x)))
    above = b.op("fsub", _number(1.0, x), quotient)
    either = b.select(b.compare("fcmp olt", magnitude, _number(0.625, x)), below, above)
    return b.intrinsic("llvm.copysign", x.type, either, x)


_ERF = (0.128379166, -0.376126289, 0.112836182, -0.026855126, 0.00519073382, -0.000803076138, 7.92036808e-05)
"""(erf(x) - x) / x in powers of x**2, |x| <= 1; error 2**-29."""

_LOG_ERFC = (
    -0.000341522216,
    -1.12708914,
    -0.63814503,
    -0.103106447,
    0.0218378324,
    -0.00294757448,
    0.000186367513,
)
"""log(1 - erf(x)), 1 <= x <= 4; it adds 2**-29 to the error of erf."""


def _erf(b: Builder, x: V) -> V:
    """A polynomial below 1, from there 1 - exp(polynomial); it is 1 in f32 from 4 on."""
    magnitude = b.intrinsic("llvm.fabs", x.type, x)
    below = _fma(b, x, _polynomial(b, b.op("fmul", x, x), _ERF), x)
    tail = _exp_bounded(b, _polynomial(b, _at_most(b, magnitude, 4.0), _LOG_ERFC))
    above = b.intrinsic("llvm.copysign", x.type, b.op("fsub", _number(1.0, x), tail), x)
    return b.select(b.compare("fcmp olt", magnitude, _number(1.0, x)), below, above)


_SIN = (-0.166666672, 0.00833338033, -0.000198535112, 2.83751319e-06)
"""(sin(r) - r) / r**3 in powers of r**2, |r| <= pi / 4; error 2**-32 of r."""

_COS = (0.0416666456, -0.00138873013, 2.44306684e-05)
"""(cos(r) - 1 + r**2 / 2) / r**4 in powers of r**2, |r| <= pi / 4; error 2**-33."""

_HALF_PI = 1.5707963267948966
_HALF_PI_LOW = 6.123233995736766e-17
_FAR = 2.0**30


def _sin_near(b: Builder, x: V, quarter: int) -> V:
    """sin(x + quarter * pi / 2), |x| <= 2**30.

    Reduced in f64: products of the multiple, below 2**30, and both parts of pi / 2 leave an error of 2**-77, and an
    f32 comes no nearer than 2**-30 to a multiple.
    """
    wide = b.cast("fpext", x, "double")
    shifted = _fma(b, wide, 2 / math.pi, 1.5 * 2**52)
    rounded = b.op("fsub", shifted, _number(1.5 * 2**52, wide))
    exact = _fma(b, rounded, -_HALF_PI_LOW, _fma(b, rounded, -_HALF_PI, wide))
    r = b.cast("fptrunc", exact, "float")
    square = b.op("fmul", r, r)
    sine = _fma(b, b.op("fmul", square, r), _polynomial(b, square, _SIN), r)
    cosine = _fma(b, b.op("fmul", square, square), _polynomial(b, square, _COS), _fma(b, square, -0.5, 1.0))
    quadrant = _integer(b, "add", b.cast("trunc", b.cast("bitcast", shifted, "i64"), "i32"), quarter)
    is_odd = b.cast("trunc", quadrant, "i1")
    sign = _integer(b, "shl", _integer(b, "and", quadrant, 2), 30)
    bits = b.cast("bitcast", b.select(is_odd, cosine, sine), "i32")
    return b.cast("bitcast", b.op("xor", bits, sign), "float")


def _circular(symbol: str, quarter: int) -> Callable[[Builder, V], V]:
    def body(b: Builder, x: V) -> V:
        magnitude = b.intrinsic("llvm.fabs", x.type, x)
        is_far = b.compare("fcmp ogt", magnitude, _number(_FAR, x))
        anywhere = b.intrinsic("llvm.vector.reduce.or", "i1", is_far) if x.lanes else is_far
        near = _sin_near(b, x, quarter)

        def with_far() -> Sequence[V]:
            """Lane by lane, so that what a lane is does not depend on the others."""
            return [
                b.select(
                    is_far, _call(b, f"x86.libm.{symbol}", x.type, [x], _by_lane(symbol), "noinline"), near
                )
            ]

        (result,) = b.choose(anywhere, with_far, lambda: [near], likely=False)
        if quarter:
            return result
        is_tiny = b.compare("fcmp olt", magnitude, _number(2.0**-13, x))
        return b.select(is_tiny, x, result)

    return body


SINGLE: dict[str, Callable[[Builder, V], V]] = {
    "exp": _exp,
    "exp2": _exp2,
    "log": _log,
    "log2": _log2,
    "tanh": _tanh,
    "erf": _erf,
    "sin": _circular("sinf", 0),
    "cos": _circular("cosf", 1),
}
"""What has polynomials in f32."""
