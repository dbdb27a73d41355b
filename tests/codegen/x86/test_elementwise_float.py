"""Arithmetic, comparisons and selections of floats, bit for bit."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from elementwise_harness import Array, assert_same, decode, encode, inputs, make_op, run_op

FLOATS = ("f64", "f32", "f16", "bf16")
NATIVE = {"f64": np.float64, "f32": np.float32, "f16": np.float32, "bf16": np.float32}
"""What the arithmetic of a format is done in."""

LEVELS = pytest.mark.parametrize("level", supported_levels())


def in_wider(reference: Callable[..., Array], element: str, *arrays: Array) -> Array:
    """The reference in f32 or f64, rounded to the format by looking it up."""
    with np.errstate(all="ignore"):
        wide = reference(*(decode(array, element).astype(NATIVE[element]) for array in arrays))
        return encode(wide.astype(np.float64), element)


def largest(x: Array, y: Array) -> Array:
    """The number where one is NaN, -0 below +0."""
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.maximum(x, y)))


def maximum(x: Array, y: Array) -> Array:
    """NaN where one is, -0 below +0; torch and NumPy leave the zeros to chance."""
    zero = (x == 0) & (y == 0)
    return np.where(zero, np.where(np.signbit(x) & np.signbit(y), x, 0), np.maximum(x, y)).astype(x.dtype)


BINARY: dict[str, Callable[..., Array]] = {
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "tt.precise_divf": np.divide,
    "arith.remf": np.fmod,
    "arith.maxnumf": largest,
    "arith.minnumf": lambda x, y: -largest(-x, -y),
    "arith.maximumf": maximum,
    "arith.minimumf": lambda x, y: -maximum(-x, -y),
}
UNARY: dict[str, Callable[..., Array]] = {
    "arith.negf": np.negative,
    "math.absf": np.abs,
    "math.floor": np.floor,
    "math.ceil": np.ceil,
    "math.trunc": np.trunc,
    "math.roundeven": np.rint,
    "math.round": lambda x: torch.sgn(torch.from_numpy(x)).numpy() * round_away(np.abs(x)),
    "math.sqrt": np.sqrt,
    "tt.precise_sqrt": np.sqrt,
}


def round_away(x: Array) -> Array:
    """Halves up; x is not negative."""
    whole = np.floor(x)
    return whole + ((x - whole) >= 0.5)


@LEVELS
@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, element: str, level: str) -> None:
    x, y = inputs(element, element, seed=1)
    expected = in_wider(BINARY[name], element, x, y)
    results = run_op(make_op(name, [element] * 2, element), level, x, y)
    assert_same(results, expected, element, zeros="numf" not in name)


@LEVELS
@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, element: str, level: str) -> None:
    (x,) = inputs(element, seed=2)
    expected = in_wider(UNARY[name], element, x)
    results = run_op(make_op(name, [element], element), level, x)
    assert_same(results, expected, element, zeros=name != "math.round")


@LEVELS
@pytest.mark.parametrize("element", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("name", ["arith.negf", "math.absf"])
def test_signs_of_nan_keep_the_payload(name: str, element: str, level: str) -> None:
    (x,) = inputs(element, seed=3)
    bits = f"u{x.itemsize}"
    sign = np.array(1 << (8 * x.itemsize - 1), bits)
    expected = x.view(bits) ^ sign if name == "arith.negf" else x.view(bits) & ~sign
    for result in run_op(make_op(name, [element], element), level, x):
        assert np.array_equal(result.view(bits), expected)


ORDERED: list[Callable[..., Array]] = [
    lambda x, y: np.zeros(x.shape, np.bool_),
    np.equal,
    np.greater,
    np.greater_equal,
    np.less,
    np.less_equal,
    lambda x, y: (x < y) | (x > y),
    lambda x, y: ~(np.isnan(x) | np.isnan(y)),
]
"""Of predicates 0 to 7."""
UNORDERED = (1, 2, 3, 4, 5, 6, 0)
"""Predicates 8 to 14 are these, or NaN."""


@LEVELS
@pytest.mark.parametrize("element", ["f64", "f32", "bf16", "f8E4M3FN"])
def test_all_predicates(element: str, level: str) -> None:
    x, y = inputs(element, element, seed=4)
    wide = decode(x, element), decode(y, element)
    nan = np.isnan(wide[0]) | np.isnan(wide[1])
    for predicate in range(16):
        if predicate < 8:
            expected = ORDERED[predicate](*wide)
        elif predicate == 15:
            expected = np.ones(x.shape, np.bool_)
        else:
            expected = ORDERED[UNORDERED[predicate - 8]](*wide) | nan
        op = make_op("arith.cmpf", [element] * 2, "i1", {"predicate": predicate})
        assert_same(run_op(op, level, x, y), expected, "i1")


@LEVELS
@pytest.mark.parametrize("element", ["f64", "f32", "f16", "bf16", "f8E5M2", "i32", "i1", "ptr"])
def test_select(element: str, level: str) -> None:
    c, x, y = inputs("i1", element, element, seed=5)
    for result in run_op(make_op("arith.select", ["i1", element, element], element), level, c, x, y):
        assert np.array_equal(result.view(np.uint8), np.where(c, x, y).view(np.uint8))


@LEVELS
@pytest.mark.parametrize("element", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("propagates", [False, True])
def test_clamp(propagates: bool, element: str, level: str) -> None:
    x, low, high = inputs(element, element, element, seed=6)
    lower, upper = BINARY["arith.maximumf" if propagates else "arith.maxnumf"], np.minimum
    upper = BINARY["arith.minimumf" if propagates else "arith.minnumf"]
    expected = in_wider(lambda a, b, c: upper(lower(a, b), c), element, x, low, high)
    attributes = {"propagateNan": 65535 if propagates else 0}
    op = make_op("tt.clampf", [element] * 3, element, attributes)
    assert_same(run_op(op, level, x, low, high), expected, element, zeros=propagates)


def libm_fma(*arguments: float) -> float:
    function = ctypes.CDLL("libm.so.6").fma
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return float(function(*arguments))


def exact_fma(element: str, *codes: Array) -> Array:
    """Rounded once from rational numbers: f64 gives a candidate, which is compared with its neighbours.

    f64 itself is libm's, where a candidate could be far off.
    """
    values = [decode(array, element) for array in codes]
    if element == "f64":
        return np.array([libm_fma(*item) for item in zip(*values, strict=True)])
    near = encode(values[0] * values[1] + values[2], element)
    finite = np.all(np.isfinite(values), axis=0) & np.isfinite(decode(near, element))
    for i in np.flatnonzero(finite):
        x, y, z = (Fraction(float(value[i])) for value in values)
        exact = x * y + z
        if exact:
            near[i] = _nearest(element, near[i : i + 1], exact)
    return near


def _nearest(element: str, code: Array, exact: Fraction) -> np.generic:
    bits = int(code.view(f"u{code.itemsize}")[0])
    around = np.array([max(bits - 1, 0), bits, bits + 1]).astype(f"u{code.itemsize}").view(code.dtype)
    numbers = decode(around, element)
    errors = [abs(Fraction(float(n)) - exact) if np.isfinite(n) else Fraction(1 << 2000) for n in numbers]
    even = [int(item) & 1 for item in around.view(f"u{code.itemsize}")]
    return around[min(range(3), key=lambda i: (errors[i], even[i]))]


@LEVELS
@pytest.mark.parametrize("element", ["f16", "bf16", "f32", "f64"])
def test_fma_is_rounded_once(element: str, level: str) -> None:
    x, y, z = inputs(element, element, element, count=4096, seed=7)
    keep = np.random.default_rng(8).permutation(x.size)[:4096]
    x, y, z = x[keep], y[keep], z[keep]
    with np.errstate(all="ignore"):
        z[:1024] = encode(-decode(x[:1024], element) * decode(y[:1024], element), element)
        expected = exact_fma(element, x, y, z)
    results = run_op(make_op("math.fma", [element] * 3, element), level, x, y, z)
    assert_same(results, expected, element)
