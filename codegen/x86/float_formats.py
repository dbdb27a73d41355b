"""Conversions between the float formats, exact in every bit, on scalars and vectors of any lanes.

Formats go by TTIR's names: f64, f32, f16, bf16, f8E4M3FN, f8E5M2; the 8-bit ones travel as i8 and bf16 as i16, which
is rounded with integer instructions: LLVM turns its own `fptrunc` to bfloat into a call per lane, and AVX512-BF16
flushes subnormals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from moecc.codegen.x86.builder import Builder, V, constant
from moecc.codegen.x86.errors import UnsupportedError

FORMATS = frozenset({"f64", "f32", "f16", "bf16", "f8E4M3FN", "f8E5M2"})


def convert(b: Builder, value: V, source: str, target: str, *, toward_zero: bool = False) -> V:
    """Rounded once: to nearest even, or toward zero.

    To f16 and bf16 a number out of range becomes infinity, or toward zero the largest finite one. To the 8-bit
    formats it saturates to the largest finite one as `cvt.rn.satfinite` of sm_90 does, infinity included, and NaN
    becomes 0x7f. Toward zero f8E5M2 keeps infinity, as Triton on sm_90 does by truncating f16.
    """
    for name in (source, target):
        if name not in FORMATS:
            raise UnsupportedError(
                f"the float format {name}", hint="fp64, fp32, fp16, bf16, fp8e4nv and fp8e5 are"
            )
    if source == target:
        return value
    if source != "f64":
        single = to_single(b, value, source)
        return (
            b.cast("fpext", single, "double") if target == "f64" else _narrow(b, single, target, toward_zero)
        )
    if target == "f32":
        return _truncated(b, value, "float") if toward_zero else b.cast("fptrunc", value, "float")
    return _narrow(b, _to_odd(b, value), target, toward_zero)


_SMALL = {"f8E4M3FN": (3, 7, 0x7E), "f8E5M2": (2, 15, 0x7B)}
"""Bits of the fraction, bias of the exponent, the largest finite number."""


def bits_of_small(number: float, element: str) -> int:
    """The finite 8-bit float nearest to a number; of two the smaller."""
    fraction_bits, bias, largest = _SMALL[element]

    def value(bits: int) -> float:
        exponent, fraction = bits >> fraction_bits, bits & ((1 << fraction_bits) - 1)
        digits = fraction + ((exponent > 0) << fraction_bits)
        return math.ldexp(digits, max(exponent, 1) - bias - fraction_bits)

    nearest = min(range(largest + 1), key=lambda bits: abs(value(bits) - abs(number)))
    return nearest | (0x80 if math.copysign(1, number) < 0 else 0)


def to_single(b: Builder, value: V, source: str) -> V:
    """f32 of a format that it holds exactly."""
    if source == "f32":
        return value
    if source == "f16":
        return b.cast("fpext", value, "float")
    if source == "bf16":
        bits = b.cast("zext", value, "i32")
        return b.cast("bitcast", _op(b, "shl", bits, 16), "float")
    if source == "f8E5M2":
        bits = _op(b, "shl", b.cast("zext", value, "i16"), 8)
        return b.cast("fpext", b.cast("bitcast", bits, "half"), "float")
    return _from_e4m3(b, value)


def from_single(b: Builder, value: V, target: str) -> V:
    """f32 rounded to nearest even; see `convert`."""
    return _narrow(b, value, target, toward_zero=False)


def fused_multiply_add(b: Builder, x: V, y: V, z: V, source: str) -> V:
    """x * y + z of f16 or bf16, rounded once.

    The product of two is exact in f64. The sum is rounded there to odd (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008; its error is Knuth's TwoSum), which a later rounding to fewer bits does not see.
    """
    x, y, z = (b.cast("fpext", to_single(b, item, source), "double") for item in (x, y, z))
    product = b.op("fmul", x, y)
    total = b.op("fadd", product, z)
    part = b.op("fsub", total, product)
    rest = b.op("fsub", product, b.op("fsub", total, part))
    error = b.op("fadd", rest, b.op("fsub", z, part))
    return _narrow(b, _to_odd(b, _odd_sum(b, total, error)), source, toward_zero=False)


def _odd_sum(b: Builder, total: V, error: V) -> V:
    """total + error, where |error| is at most half a unit of total, rounded to odd; an infinite total stays."""
    bits = b.cast("bitcast", total, "i64")
    zero = constant(0, "double", total.lanes)
    signs = b.op("xor", bits, b.cast("bitcast", error, "i64"))
    opposite = b.cast("zext", b.compare("icmp slt", signs, constant(0, "i64", total.lanes)), "i64")
    odd = _op(b, "or", b.op("sub", bits, opposite), 1)
    inexact = b.compare("fcmp one", error, zero)
    return b.cast("bitcast", b.select(inexact, odd, bits), "double")


def _op(b: Builder, name: str, value: V, number: int) -> V:
    return b.op(name, value, constant(number, value.lane_type, value.lanes))


def _from_e4m3(b: Builder, value: V) -> V:
    """Through f16, whose exponents reach 8 lower: a shift, and a multiplication by 2**8 in f32."""
    wide = b.cast("zext", value, "i16")
    magnitude = _op(b, "and", wide, 0x7F)
    sign = _op(b, "shl", _op(b, "and", wide, 0x80), 8)
    half = b.cast("bitcast", b.op("or", _op(b, "shl", magnitude, 7), sign), "half")
    scaled = b.op("fmul", b.cast("fpext", half, "float"), constant(256.0, "float", value.lanes))
    is_nan = b.compare("icmp eq", magnitude, constant(0x7F, "i16", value.lanes))
    return b.select(is_nan, constant(float("nan"), "float", value.lanes), scaled)


def _truncated(b: Builder, value: V, lane_type: str) -> V:
    """An `fptrunc` toward zero: the nearest, less one unit where that is larger in magnitude."""
    integer = {"float": "i32", "half": "i16"}[lane_type]
    nearest = b.cast("fptrunc", value, lane_type)
    larger = _is_larger(b, nearest, value)
    bits = b.op("sub", b.cast("bitcast", nearest, integer), b.cast("zext", larger, integer))
    return b.cast("bitcast", bits, lane_type)


def _is_larger(b: Builder, rounded: V, value: V) -> V:
    back = b.cast("fpext", rounded, value.lane_type)
    magnitudes = (b.intrinsic("llvm.fabs", value.type, item) for item in (back, value))
    return b.compare("fcmp ogt", *magnitudes)


def _to_odd(b: Builder, value: V) -> V:
    """f64 to f32: truncated, with the last bit set where that was inexact, so that rounding further is right."""
    cut = _truncated(b, value, "float")
    inexact = b.compare("fcmp one", b.cast("fpext", cut, "double"), value)
    bits = b.op("or", b.cast("bitcast", cut, "i32"), b.cast("zext", inexact, "i32"))
    return b.cast("bitcast", bits, "float")


def _narrow(b: Builder, value: V, target: str, toward_zero: bool) -> V:
    if target == "f32":
        return value
    if target == "f16":
        return _truncated(b, value, "half") if toward_zero else b.cast("fptrunc", value, "half")
    if target == "bf16":
        return _to_bfloat(b, value, toward_zero)
    return _to_minifloat(b, value, _MINIFLOATS[target], toward_zero)


def _to_bfloat(b: Builder, value: V, toward_zero: bool) -> V:
    bits = b.cast("bitcast", value, "i32")
    rounded = bits if toward_zero else _round_bits(b, bits, 16)
    quiet = _op(b, "or", bits, 0x400000)
    kept = b.select(b.compare("fcmp uno", value, constant(0.0, "float", value.lanes)), quiet, rounded)
    return b.cast("trunc", _op(b, "lshr", kept, 16), "i16")


def _round_bits(b: Builder, bits: V, dropped: int) -> V:
    """bits with half a unit of what a shift by `dropped` keeps added, ties to even; below are arbitrary bits."""
    last = _op(b, "and", _op(b, "lshr", bits, dropped), 1)
    return b.op("add", _op(b, "add", bits, (1 << (dropped - 1)) - 1), last)


@dataclass(frozen=True)
class _Minifloat:
    """Stored bits of the significand, bias of the exponent, the largest finite number's bits."""

    mantissa: int
    bias: int
    largest: int
    infinity: int | None


_MINIFLOATS = {
    "f8E4M3FN": _Minifloat(3, 7, 0x7E, None),
    "f8E5M2": _Minifloat(2, 15, 0x7B, 0x7C),
}


def _to_minifloat(b: Builder, value: V, form: _Minifloat, toward_zero: bool) -> V:
    bits = b.cast("bitcast", value, "i32")
    number = partial(constant, lane_type="i32", lanes=value.lanes)
    magnitude = _op(b, "and", bits, 0x7FFFFFFF)
    dropped = 23 - form.mantissa
    rounded = magnitude if toward_zero else _round_bits(b, magnitude, dropped)
    normal = b.op("sub", _op(b, "lshr", rounded, dropped), number((127 - form.bias) << form.mantissa))
    is_small = b.compare("icmp ult", magnitude, number((128 - form.bias) << 23))
    finite = b.select(is_small, _subnormal(b, magnitude, form, toward_zero), normal)
    kept = b.intrinsic("llvm.umin", finite.type, finite, number(form.largest))
    infinity = number(0x7F800000)
    if toward_zero and form.infinity is not None:
        kept = b.select(b.compare("icmp eq", magnitude, infinity), number(form.infinity), kept)
    sign = _op(b, "and", _op(b, "lshr", bits, 24), 0x80)
    is_nan = b.compare("icmp ugt", magnitude, infinity)
    return b.cast("trunc", b.select(is_nan, number(0x7F), b.op("or", kept, sign)), "i8")


def _subnormal(b: Builder, magnitude: V, form: _Minifloat, toward_zero: bool) -> V:
    """Units of the smallest number. To nearest: added to 2**23 units, where f32's own rounding leaves them."""
    small = b.cast("bitcast", magnitude, "float")
    exponent = 1 - form.bias - form.mantissa
    if toward_zero:
        below_two = b.intrinsic("llvm.minnum", small.type, small, constant(2.0, "float", small.lanes))
        units = b.op("fmul", below_two, constant(2.0**-exponent, "float", small.lanes))
        return b.cast("fptoui", units, "i32")
    base = constant(2.0 ** (23 + exponent), "float", small.lanes)
    total = b.cast("bitcast", b.op("fadd", small, base), "i32")
    return b.op("sub", total, b.cast("bitcast", base, "i32"))
