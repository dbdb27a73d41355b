"""Conversions between float formats, and between integers and floats, bit for bit."""

from __future__ import annotations

import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from elementwise_harness import (
    DTYPES,
    FORMATS,
    Array,
    assert_same,
    decode,
    encode,
    inputs,
    make_op,
    run_op,
)

LEVELS = pytest.mark.parametrize("level", supported_levels())
FLOATS = ("f64", "f32", "f16", "bf16", "f8E4M3FN", "f8E5M2")


def near_ties(source: str, target: str) -> Array:
    """The numbers of a small format, the middles between them, and their neighbours, as the source has them."""
    numbers = FORMATS[target].numbers[:: max(1, FORMATS[target].numbers.size // 512)]
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = np.concatenate([numbers, middles, numbers[-1:] * 1.001, FORMATS[target].numbers[-2:] * 1.03])
    codes = encode(np.concatenate([around, -around]), source)
    bits = codes.view(f"u{codes.itemsize}")
    return np.concatenate([bits, bits + 1, bits - 1]).view(codes.dtype)


def floats(source: str, target: str) -> Array:
    """Random bits, of which many are out of the target's range, and numbers in it."""
    (x,) = inputs(source, count=4096, seed=11)
    scaled = np.random.default_rng(12).normal(0, 1, 4096) * 2.0 ** np.random.default_rng(13).uniform(
        -30, 17, 4096
    )
    parts = [x, encode(scaled, source)]
    if target in FORMATS:
        parts.append(near_ties(source, target))
    joined = np.concatenate(parts)
    return np.resize(joined, -(-joined.size // 16) * 16)


@LEVELS
@pytest.mark.parametrize("rounding", ["rtne", "rtz"])
@pytest.mark.parametrize(("source", "target"), list(permutations(FLOATS, 2)))
def test_float_to_float(source: str, target: str, rounding: str, level: str) -> None:
    x = floats(source, target)
    toward_zero = rounding == "rtz"
    expected = encode(decode(x, source), target, toward_zero=toward_zero)
    op = make_op("tt.fp_to_fp", [source], target, {"rounding": 0 if toward_zero else 1})
    assert_same(run_op(op, level, x), expected, target)


@LEVELS
@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("arith.extf", "f16", "f32"),
        ("arith.extf", "bf16", "f32"),
        ("arith.extf", "f32", "f64"),
        ("arith.truncf", "f64", "f32"),
        ("arith.truncf", "f64", "f16"),
        ("arith.truncf", "f64", "bf16"),
        ("arith.truncf", "f32", "f16"),
        ("arith.truncf", "f32", "bf16"),
    ],
)
def test_extension_and_truncation(name: str, source: str, target: str, level: str) -> None:
    x = floats(source, target)
    expected = encode(decode(x, source), target)
    assert_same(run_op(make_op(name, [source], target), level, x), expected, target)


@LEVELS
@pytest.mark.parametrize("target", ["f8E4M3FN", "f8E5M2"])
def test_small_floats_saturate(target: str, level: str) -> None:
    x = np.resize(np.array([np.inf, -np.inf, 1e30, -1e30, 464.0, np.nan, -0.0, 1e-30], np.float32), 16)
    largest, sign = FORMATS[target].largest, 0x80
    expected = [largest, largest | sign, largest, largest | sign, None, 0x7F, sign, 0]
    for result in run_op(make_op("tt.fp_to_fp", ["f32"], target), level, x):
        assert [code for code, want in zip(result, expected * 2, strict=True) if want is not None] == [
            want for want in expected * 2 if want is not None
        ]


def test_bfloat_subnormals_are_kept() -> None:
    x = np.resize(np.array([1e-40, -1e-40, 9.2e-41, 1.2e-38], np.float32), 16)
    for result in run_op(make_op("arith.truncf", ["f32"], "bf16"), supported_levels()[-1], x):
        assert (result == encode(x.astype(np.float64), "bf16")).all()
        assert (result & 0x7FFF).all()


@LEVELS
@pytest.mark.parametrize("target", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("source", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("signed", [True, False], ids=["fptosi", "fptoui"])
def test_float_to_integer_saturates(signed: bool, source: str, target: str, level: str) -> None:
    (x,) = inputs(source, seed=14)
    width = 8 * np.dtype(DTYPES[target]).itemsize
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    extra = encode(
        np.array([low - 1.0, low - 0.5, low, high - 1.0, high, high + 0.5, high + 1.0, 0.9] * 2), source
    )
    x = np.concatenate([x, extra])
    wide = decode(x, source)
    whole = [0 if np.isnan(v) else low if v < low else high if v > high else int(v) for v in wide.tolist()]
    expected = (
        np.array([v % (1 << width) for v in whole], np.uint64).astype(f"u{width // 8}").view(DTYPES[target])
    )
    op = make_op("arith.fptosi" if signed else "arith.fptoui", [source], target)
    assert_same(run_op(op, level, x), expected, target)


@LEVELS
@pytest.mark.parametrize("target", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("source", ["i1", "i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("signed", [True, False], ids=["sitofp", "uitofp"])
def test_integer_to_float(signed: bool, source: str, target: str, level: str) -> None:
    """The 16-bit formats by way of f32."""
    (x,) = inputs(source, seed=15)
    if source == "i1":
        whole = -x.astype(np.int64) if signed else x.astype(np.int64)
    else:
        whole = x if signed else x.view(f"u{x.itemsize}")
    expected = whole.astype(np.float64 if target == "f64" else np.float32).astype(np.float64)
    op = make_op("arith.sitofp" if signed else "arith.uitofp", [source], target)
    assert_same(run_op(op, level, x), encode(expected, target), target)


@LEVELS
@pytest.mark.parametrize(
    ("source", "target"),
    [("f32", "i32"), ("i32", "f32"), ("f64", "i64"), ("bf16", "i16"), ("i16", "f16"), ("f16", "bf16"),
     ("f8E4M3FN", "i8"), ("i8", "f8E5M2"), ("f8E5M2", "f8E4M3FN"), ("ptr", "ptr")],
)  # fmt: skip
def test_bitcast(source: str, target: str, level: str) -> None:
    (x,) = inputs(source, seed=16)
    for name in ("tt.bitcast", "arith.bitcast"):
        for result in run_op(make_op(name, [source], target), level, x):
            assert np.array_equal(result.view(np.uint8), x.view(np.uint8))


@LEVELS
@pytest.mark.parametrize(
    ("name", "source", "target"), [("tt.int_to_ptr", "i64", "ptr"), ("tt.ptr_to_int", "ptr", "i64")]
)
def test_pointers(name: str, source: str, target: str, level: str) -> None:
    (x,) = inputs(source, seed=17)
    for result in run_op(make_op(name, [source], target), level, x):
        assert np.array_equal(result.view(np.uint64), x.view(np.uint64))


def test_unknown_format_is_a_located_error() -> None:
    x = np.zeros(16, np.uint8)
    DTYPES["f8E4M3B11FNUZ"] = np.uint8
    with pytest.raises(
        UnsupportedError, match=r"kernel.py:3:5: x86: the float format f8E4M3B11FNUZ"
    ) as caught:
        run_op(make_op("tt.fp_to_fp", ["f32"], "f8E4M3B11FNUZ"), "avx2", x)
    assert "hint" in str(caught.value)
