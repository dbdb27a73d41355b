"""Functions of the math dialect and of libdevice: 2 units in the last place of f32 over the whole range."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moecc.codegen.x86 import libdevice
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from elementwise_harness import (
    LANES,
    Array,
    assert_same,
    decode,
    encode,
    inputs,
    make_op,
    run_op,
    specials,
    units_apart,
)

LEVELS = pytest.mark.parametrize("level", supported_levels())


def each(function: Callable[..., float]) -> Callable[..., Array]:
    """A function of Python's floats over arrays; what it refuses is not compared."""

    def one(*arguments: float) -> float:
        try:
            return function(*arguments)
        except (ValueError, OverflowError):
            return math.nan

    return np.vectorize(one, otypes=[np.float64])


REFERENCES: dict[str, Callable[..., Array]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "expm1": np.expm1,
    "log1p": np.log1p,
    "log10": np.log10,
    "tan": np.tan,
    "atan": np.arctan,
    "sinh": np.sinh,
    "erfc": lambda x: torch.special.erfc(torch.from_numpy(x)).numpy(),
}
BY_POLYNOMIAL = ("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf", "rsqrt")


def reference(name: str, *arrays: Array) -> Array:
    with np.errstate(all="ignore"):
        return REFERENCES[name](*(array.astype(np.float64) for array in arrays))


def whole_range(count: int) -> Array:
    """f32 spread evenly over all bit patterns, with a random offset to each; numbers of common size; special ones."""
    random, stride = np.random.default_rng(31), (1 << 32) // count
    patterns = np.arange(count) * stride + random.integers(0, stride, count)
    common = [random.uniform(-20, 20, count), random.normal(1, 0.3, count), random.uniform(-110, 130, count)]
    numbers = np.concatenate(common).astype(np.float32)
    return np.concatenate(
        [patterns.astype(np.uint32).view(np.float32), numbers, np.resize(specials("f32"), 64)]
    )


@LEVELS
@pytest.mark.parametrize("name", BY_POLYNOMIAL)
def test_within_two_units(name: str, level: str) -> None:
    x = whole_range(1 << 18)
    exact = reference(name, x)
    for result in run_op(make_op(f"math.{name}", ["f32"], "f32"), level, x):
        distance = units_apart(result, exact)
        at = int(np.argmax(distance))
        assert distance[at] <= 2, f"{distance[at]} units at {x[at]!r}: {result[at]!r}, not {exact[at]!r}"
        zero = x == 0
        assert np.array_equal(np.signbit(result[zero]), np.signbit(exact[zero]))


@LEVELS
@pytest.mark.parametrize("name", BY_POLYNOMIAL)
def test_scalars_and_vectors_agree(name: str, level: str) -> None:
    """Whether a value is uniform or not must not change it."""
    x = whole_range(1 << 12)
    results = run_op(make_op(f"math.{name}", ["f32"], "f32"), level, x)
    for result in results[1:]:
        assert_same([result] * len(LANES), results[0], "f32")


@LEVELS
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_arguments_are_reduced_right(name: str, level: str) -> None:
    """Among them f32's worst cases, and lanes that are far beside lanes that are near."""
    worst = [16367173.0 * 2.0**72, 1.6e38, 2.0**30, np.nextafter(np.float32(2.0**30), np.float32(3e9)), 1e22]
    x = np.resize(np.array([*worst, 0.5, -0.0, 1e9, -3e9, 11.0 * math.pi, 1e-30], np.float32), 64)
    exact = reference(name, x)
    for result in run_op(make_op(f"math.{name}", ["f32"], "f32"), level, x):
        assert units_apart(result, exact).max() <= 2


@LEVELS
@pytest.mark.parametrize("name", ["expm1", "log1p", "log10", "tan", "atan", "sinh", "erfc"])
def test_libm_in_single(name: str, level: str) -> None:
    """erfc's own reference is f64's; libm documents up to 4 units for these."""
    x = whole_range(1 << 10)
    exact = reference(name, x)
    for result in run_op(make_op(f"math.{name}", ["f32"], "f32"), level, x):
        assert units_apart(result, exact).max() <= 4


@LEVELS
@pytest.mark.parametrize("name", REFERENCES)
def test_double(name: str, level: str) -> None:
    x = np.concatenate([np.random.default_rng(32).normal(0, 3, 4096), np.resize(specials("f64"), 64)])
    x = np.where(np.abs(x) > 1e300, np.inf, x)
    exact = reference(name, x)
    for result in run_op(make_op(f"math.{name}", ["f64"], "f64"), level, x):
        np.testing.assert_allclose(result, exact, rtol=4e-15, atol=0 if name != "erfc" else 1e-300)


@LEVELS
@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "rsqrt", "sin"])
def test_small_formats_are_rounded_from_single(name: str, element: str, level: str) -> None:
    (x,) = inputs(element, count=8192, seed=33)
    in_single = run_op(make_op(f"math.{name}", ["f32"], "f32"), level, decode(x, element).astype(np.float32))
    expected = encode(in_single[0].astype(np.float64), element)
    assert_same(run_op(make_op(f"math.{name}", [element], element), level, x), expected, element)


@LEVELS
@pytest.mark.parametrize("element", ["f32", "f64"])
def test_power(element: str, level: str) -> None:
    x, y = inputs(element, element, count=1024, seed=34)
    x[-512:], y[-512:] = np.abs(np.random.default_rng(35).normal(0, 3, (2, 512)))
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
    for result in run_op(make_op("math.powf", [element] * 2, element), level, x, y):
        if element == "f32":
            assert units_apart(result, exact).max() <= 2
        else:
            np.testing.assert_allclose(result, exact, rtol=1e-14, atol=5e-324)


# --- tt.extern_elementwise


def declared() -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Function and types -> symbol, types and result, of every signature in libdevice.py."""
    found: dict[str, tuple[str, tuple[str, ...], str]] = {}
    names = {"fp64": "f64", "fp32": "f32", "fp16": "f16", "int32": "i32", "int64": "i64"}
    names |= {"uint32": "i32", "uint64": "i64"}

    def record(lib: str, path: str, args: list[object], table: dict, **_: object) -> SimpleNamespace:  # type: ignore[type-arg]
        for types, (symbol, result) in table.items():
            elements = tuple(names.get(str(item), str(item)) for item in types)
            found[f"{name}-{'-'.join(map(str, types))}"] = (
                symbol,
                elements,
                names.get(str(result), str(result)),
            )
        return SimpleNamespace(to=lambda *_, **__: None)

    original, libdevice.core.extern_elementwise = libdevice.core.extern_elementwise, record
    try:
        for name, function in vars(libdevice).items():
            if callable(function) and not name.startswith("_"):
                for count in (1, 2, 3):
                    try:
                        function(*[None] * count, _semantic=object())
                    except TypeError:
                        continue
    finally:
        libdevice.core.extern_elementwise = original
    return found


DECLARED = declared()

EXTERN: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "atan2": np.arctan2,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "div_rn": np.divide,
    "exp": np.exp,
    "floor": np.floor,
    "fma": lambda x, y, z: x * y + z,
    "fmod": np.fmod,
    "hypot": np.hypot,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "finitef": np.isfinite,
    "signbit": np.signbit,
    "log1p": np.log1p,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "saturatef": lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0, 1),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
    "fast_expf": np.exp,
    "fast_dividef": np.divide,
    "normcdf": each(lambda x: 0.5 * math.erfc(-x * math.sqrt(0.5))),
}


def test_many_functions_are_declared() -> None:
    assert len(DECLARED) > 150
    assert {name.partition("-")[0] for name in DECLARED} >= set(EXTERN)


@pytest.mark.parametrize("key", DECLARED)
def test_every_declared_function_compiles_and_runs(key: str) -> None:
    symbol, elements, result = DECLARED[key]
    arrays = inputs(*elements, count=256, seed=36)
    name = key.partition("-")[0]
    results = run_op(make_op("tt.extern_elementwise", elements, result, {"symbol": symbol}), "avx2", *arrays)
    for other in results[1:]:
        assert np.array_equal(other, results[0]) or result[0] in "fb"
    if name in EXTERN and elements[0] in ("f32", "f16", "bf16"):
        with np.errstate(all="ignore"):
            exact = EXTERN[name](*(decode(a, e) for a, e in zip(arrays, elements, strict=True)))
        _close(results, np.asarray(exact, np.float64), result, two_steps=name == "fma")


def _close(results: list[Array], exact: Array, element: str, *, two_steps: bool) -> None:
    """Within 4 units of f32; of the smaller formats, which are rounded from f32, one."""
    for result in results:
        if element in ("f32", "i32"):
            distance = units_apart(result.astype(np.float32), exact)
        else:
            want = encode(exact, element)
            apart = np.abs(result.view(np.int16).astype(int) - want.view(np.int16).astype(int))
            nan = np.isnan(decode(result, element)) & np.isnan(decode(want, element))
            distance = np.where(nan | (decode(result, element) == decode(want, element)), 0, apart)
        assert distance.max() <= (4 if element == "f32" else 1) or two_steps


@LEVELS
@pytest.mark.parametrize(
    ("symbol", "elements", "result", "expected"),
    [
        ("__nv_popc", ["i32"], "i32", lambda x: np.bitwise_count(x.view(np.uint32)).astype(np.int32)),
        ("__nv_popcll", ["i64"], "i32", lambda x: np.bitwise_count(x.view(np.uint64)).astype(np.int32)),
        ("__nv_mulhi", ["i32", "i32"], "i32", lambda x, y: (x.astype(np.int64) * y >> 32).astype(np.int32)),
        ("x86_ffs", ["i32"], "i32", lambda x: np.array([(v & -v).bit_length() for v in x.tolist()], np.int32)),
        ("x86_iabs", ["i64"], "i64", np.abs),
        ("x86_float_as_int", ["f32"], "i32", lambda x: x.view(np.int32)),
        ("__nv_isnand", ["f64"], "i32", lambda x: np.isnan(x).astype(np.int32)),
        ("__nv_fabsf", ["f32"], "f32", np.abs),
        ("__nv_fmaxf", ["f32", "f32"], "f32", None),
        ("__nv_sinpif", ["f32"], "f32", None),
        ("x86_nothing", ["f32"], "f32", None),
    ],
)  # fmt: skip
def test_symbols(
    symbol: str, elements: list[str], result: str, expected: Callable[..., Array] | None, level: str
) -> None:
    arrays = inputs(*elements, seed=37)
    op = make_op("tt.extern_elementwise", elements, result, {"symbol": symbol})
    if expected is None:
        with pytest.raises(
            UnsupportedError, match=rf"kernel.py:3:5: x86: the library function {symbol}.*hint"
        ):
            run_op(op, level, *arrays)
        return
    assert_same(run_op(op, level, *arrays), expected(*arrays), result)


def test_integer_powers_keep_the_sign_of_odd_exponents() -> None:
    x = np.resize(np.array([-1.0, -2.0, 3.0, 0.0], np.float32), 16)
    n = np.repeat(np.array([2**31 - 1, 3, -2, 0], np.int32), 4)
    op = make_op("tt.extern_elementwise", ["f32", "i32"], "f32", {"symbol": "x86_pow_integer"})
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), n.astype(np.float64)).astype(np.float32)
    assert_same(run_op(op, "avx2", x, n), expected, "f32")
