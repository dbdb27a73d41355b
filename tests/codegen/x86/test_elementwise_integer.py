"""Integer ops against Python's integers, what traps or is undefined elsewhere among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecc.codegen.x86.builder import Builder, Module, V, constant
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import supported_levels
from moecc.codegen.x86.integer_division import divide

sys.path.append(str(Path(__file__).parent))
from elementwise_harness import DTYPES, Array, assert_same, inputs, make_op, run_op

LEVELS = pytest.mark.parametrize("level", supported_levels())
INTEGERS = ("i8", "i16", "i32", "i64")


def bits_of(element: str) -> int:
    return 8 * np.dtype(DTYPES[element]).itemsize


def wrap(values: list[int], element: str) -> Array:
    width = bits_of(element)
    return (
        np.array([v % (1 << width) for v in values], np.uint64).astype(f"u{width // 8}").view(DTYPES[element])
    )


def unsigned(value: int, width: int) -> int:
    return value % (1 << width)


def cut(x: int, y: int) -> int:
    """Toward zero; all ones by zero."""
    return -1 if y == 0 else (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)


def by_unsigned(function: Callable[[int, int], int]) -> Callable[[int, int, int], int]:
    return lambda x, y, w: function(unsigned(x, w), unsigned(y, w))


def by_signed(function: Callable[[int, int], int]) -> Callable[[int, int, int], int]:
    return lambda x, y, w: function(x, y)


BINARY: dict[str, Callable[[int, int, int], int]] = {
    "arith.addi": by_signed(lambda x, y: x + y),
    "arith.subi": by_signed(lambda x, y: x - y),
    "arith.muli": by_signed(lambda x, y: x * y),
    "arith.andi": by_signed(lambda x, y: x & y),
    "arith.ori": by_signed(lambda x, y: x | y),
    "arith.xori": by_signed(lambda x, y: x ^ y),
    "arith.maxsi": by_signed(max),
    "arith.minsi": by_signed(min),
    "arith.maxui": by_unsigned(max),
    "arith.minui": by_unsigned(min),
    "arith.divsi": by_signed(cut),
    "arith.divui": by_unsigned(lambda x, y: x // y if y else -1),
    "arith.remsi": by_signed(lambda x, y: x - cut(x, y) * y if y else x),
    "arith.remui": by_unsigned(lambda x, y: x % y if y else x),
    "arith.floordivsi": by_signed(lambda x, y: x // y if y else -1),
    "arith.ceildivsi": by_signed(lambda x, y: -(-x // y) if y else -1),
    "arith.shli": lambda x, y, w: x << unsigned(y, w) if unsigned(y, w) < w else 0,
    "arith.shrui": lambda x, y, w: unsigned(x, w) >> unsigned(y, w) if unsigned(y, w) < w else 0,
    "arith.shrsi": lambda x, y, w: x >> min(unsigned(y, w), w - 1),
    "tt.mulhiui": lambda x, y, w: (unsigned(x, w) * unsigned(y, w)) >> w,
}


@LEVELS
@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, element: str, level: str) -> None:
    x, y = inputs(element, element, count=1024, seed=21)
    if element != "i8":
        y[-512:] = y[-512:] % 50 - 25
    width, function = bits_of(element), BINARY[name]
    expected = wrap([function(a, b, width) for a, b in zip(x.tolist(), y.tolist(), strict=True)], element)
    assert_same(run_op(make_op(name, [element] * 2, element), level, x, y), expected, element)


@LEVELS
@pytest.mark.parametrize("name", ["arith.andi", "arith.ori", "arith.xori"])
def test_truth_values(name: str, level: str) -> None:
    x, y = inputs("i1", "i1", seed=22)
    function = {"arith.andi": np.logical_and, "arith.ori": np.logical_or, "arith.xori": np.logical_xor}[name]
    assert_same(run_op(make_op(name, ["i1", "i1"], "i1"), level, x, y), function(x, y), "i1")


@LEVELS
@pytest.mark.parametrize("element", [*INTEGERS, "i1"])
def test_comparisons(element: str, level: str) -> None:
    x, y = inputs(element, element, count=512, seed=23)
    y[-128:] = x[-128:]
    bits = [array.view(f"u{array.itemsize}") for array in (x, y)]
    signed = [-array.view(np.int8) for array in (x, y)] if element == "i1" else [x, y]
    orders = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
    for predicate in range(10):
        order = orders[predicate if predicate < 6 else predicate - 4]
        expected = order(*(signed if predicate < 6 else bits))
        op = make_op("arith.cmpi", [element] * 2, "i1", {"predicate": predicate})
        assert_same(run_op(op, level, x, y), expected, "i1")


UNARY: dict[str, Callable[[int, int], int]] = {
    "math.absi": lambda x, w: abs(x),
    "math.ctpop": lambda x, w: unsigned(x, w).bit_count(),
    "math.ctlz": lambda x, w: w - unsigned(x, w).bit_length(),
    "math.cttz": lambda x, w: (unsigned(x, w) & -unsigned(x, w)).bit_length() - 1 if x else w,
}


@LEVELS
@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, element: str, level: str) -> None:
    (x,) = inputs(element, count=1024, seed=24)
    expected = wrap([UNARY[name](value, bits_of(element)) for value in x.tolist()], element)
    assert_same(run_op(make_op(name, [element], element), level, x), expected, element)


@LEVELS
@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("arith.extsi", "i8", "i32"),
        ("arith.extsi", "i32", "i64"),
        ("arith.extsi", "i1", "i32"),
        ("arith.extui", "i8", "i32"),
        ("arith.extui", "i32", "i64"),
        ("arith.extui", "i1", "i8"),
        ("arith.trunci", "i64", "i32"),
        ("arith.trunci", "i32", "i8"),
        ("arith.index_cast", "i32", "index"),
        ("arith.index_cast", "index", "i32"),
        ("arith.index_castui", "i32", "index"),
    ],
)
def test_widths(name: str, source: str, target: str, level: str) -> None:
    (x,) = inputs(source, count=1024, seed=25)
    if source == "i1":
        values = [-int(v) if name == "arith.extsi" else int(v) for v in x]
    else:
        values = (x.view(f"u{x.itemsize}") if name.endswith("ui") else x).tolist()
    assert_same(run_op(make_op(name, [source], target), level, x), wrap(values, target), target)


def test_truncation_to_a_truth_value() -> None:
    (x,) = inputs("i32", seed=26)
    assert_same(run_op(make_op("arith.trunci", ["i32"], "i1"), "avx2", x), (x & 1).astype(np.bool_), "i1")


@pytest.mark.parametrize(("divisor", "harmless"), [(7, True), (-7, True), (0, False), (-1, False)])
def test_a_constant_divisor_needs_no_guard(divisor: int, harmless: bool) -> None:
    b = Builder(Module())
    divide(b, V("%x", "<16 x i32>"), constant(divisor, "i32", 16), signed=True)
    assert any("sdiv" in line for line in b.lines) == harmless
    assert len(b.lines) == 1 or not harmless


def test_an_op_that_is_none_is_a_located_error() -> None:
    with pytest.raises(UnsupportedError, match=r"^kernel.py:3:5: x86: the op math.nothing is not supported$"):
        run_op(make_op("math.nothing", ["i32"], "i32"), "avx2", np.zeros(16, np.int32))


def test_inline_assembly_is_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedError, match="inline assembly is not supported; hint"):
        run_op(make_op("tt.elementwise_inline_asm", ["i32"], "i32"), "avx2", np.zeros(16, np.int32))
