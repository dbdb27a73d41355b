"""One elementwise op compiled by itself, run over arrays as scalars and as vectors, and the float formats by their definition."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moecc.codegen.x86 import glue
from moecc.codegen.x86.builder import Builder, Module, V, vector
from moecc.codegen.x86.elementwise import lower_elementwise
from moecc.codegen.x86.features import LEVELS, Level
from moecc.codegen.x86.tree import Attribute, Op, Value
from moecc.codegen.x86.types import Type

Array = NDArray[np.generic]

LANES = (0, 4, 16)
"""0 is a scalar."""

DTYPES: dict[str, type[np.generic]] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "f8E4M3FN": np.uint8,
    "f8E5M2": np.uint8,
    "i64": np.int64,
    "index": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "i1": np.bool_,
    "ptr": np.uint64,
}
"""Element -> how arrays hold it: what NumPy lacks, as its bits."""


def make_op(
    name: str,
    operands: Sequence[str],
    result: str,
    attributes: Mapping[str, Attribute] | None = None,
) -> Op:
    values = [Value(f"%a{i}", Type(element)) for i, element in enumerate(operands)]
    op = Op(name, values, [], dict(attributes or {}), [], "kernel.py:3:5")
    op.results = [Value("%r", Type(result), op)]
    return op


def run_op(op: Op, level: str, *arrays: Array) -> list[Array]:
    """The results of the op over arrays of one size, a multiple of 16: as scalars, and in vectors of 4 and 16."""
    count = arrays[0].size
    out_type = DTYPES[op.result.type.element]
    outputs = [np.full(count * out_type().itemsize, 0xA5, np.uint8).view(out_type) for _ in LANES]
    inputs = [np.ascontiguousarray(array) for array in arrays]
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*inputs, *outputs)]
    _compile(op, LEVELS[level])(*pointers, ctypes.c_int64(count))
    return list(outputs)


def _compile(op: Op, level: Level) -> ctypes._NamedFuncPointer:
    text, parameters = llvm_ir(op, level)
    types = ["!llvm.ptr"] * (parameters - 1) + ["i64"]
    code = glue.machine_code(glue.optimise(text, "body", types, level.cpu, level.llvm), level.cpu, level.llvm)
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(glue.link(code))
        file.flush()
        return ctypes.CDLL(file.name).kernel_entry


def llvm_ir(op: Op, level: Level, lanes: Sequence[int] = LANES) -> tuple[str, int]:
    """A function `body` of pointers to the operands, one to a result per entry of lanes, and the count."""
    module = Module(avx512=level.vector_bytes == 64)
    b = Builder(module)
    operands = len(op.operands)
    pointers = [V(f"%p{i}", "ptr") for i in range(operands + len(lanes))]
    for width, output in zip(lanes, pointers[operands:], strict=True):
        _loop(b, op, pointers[:operands], output, width)
    b.run("ret void")
    parameters = ", ".join(pointer.typed for pointer in pointers)
    features = f'"target-cpu"="{level.cpu}" "target-features"="{level.llvm}"'
    attributes = f'attributes #0 = {{ {features} "prefer-vector-width"="{8 * level.vector_bytes}" }}\n'
    function = b.function(f"define void @body({parameters}, i64 %count) #0")
    return module.text() + function + attributes, len(pointers) + 1


def _loop(b: Builder, op: Op, inputs: Sequence[V], output: V, lanes: int) -> None:
    def once(i: V, _: list[V]) -> Sequence[V]:
        arguments = []
        for pointer, operand in zip(inputs, op.operands, strict=True):
            lane = operand.type.llvm
            arguments.append(b.load(vector(lanes, lane), b.address(pointer, i, lane)))
        result = lower_elementwise(b, op, arguments)
        b.store(result, b.address(output, i, op.result.type.llvm))
        return ()

    b.loop(0, V("%count", "i64"), max(lanes, 1), once)


# --- inputs


def random_bits(element: str, count: int, seed: int) -> Array:
    dtype = DTYPES[element]
    if dtype is np.bool_:
        return np.random.default_rng(seed).integers(0, 2, count).astype(np.bool_)
    data = np.random.default_rng(seed).bytes(count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).copy()


def specials(element: str) -> Array:
    """What is easily wrong: the ends of the ranges, both zeros, infinities, NaN, subnormal numbers, halves."""
    if element in FORMATS:
        form = FORMATS[element]
        infinity = form.infinity if form.infinity is not None else form.largest
        one = form.bias << form.mantissa
        positive = [0, 1, 2, (1 << form.mantissa) - 1, 1 << form.mantissa, one, one - 1, one + 1]
        positive += [one | (1 << form.mantissa - 1), form.largest, form.largest - 1, infinity, form.nan]
        sign = 1 << (form.bits - 1)
        bits = np.array([*positive, *(code | sign for code in positive)])
        return bits.astype(f"u{form.bits // 8}").view(DTYPES[element])
    if element in ("f32", "f64"):
        info = np.finfo(DTYPES[element])  # type: ignore[arg-type]
        low = [0.0, info.smallest_subnormal, info.tiny, info.eps, 0.5, 1.0, 1.5, 2.5, 2.0**31, 2.0**63]
        high = [float(info.max), np.inf, np.nan, 127.5, 255.5, 65535.5, 2.0**15, 2.0**23 + 1, 2.0**32]
        return np.array([*low, *high, *(-x for x in low + high)], DTYPES[element])
    if element == "i1":
        return np.array([False, True])
    width = np.dtype(DTYPES[element]).itemsize * 8
    values = [0, 1, 2, 3, 7, width - 1, width, width + 1, (1 << (width - 1)) - 1, 1 << (width - 1)]
    values += [(1 << width) - value for value in values if value]
    return (
        np.array([v % (1 << width) for v in values], np.uint64).astype(f"u{width // 8}").view(DTYPES[element])
    )


def inputs(*elements: str, count: int = 2048, seed: int = 0) -> list[Array]:
    """Every combination of special values, then random bits; the size is a multiple of 16."""
    lists = [specials(element) for element in elements]
    grid = np.meshgrid(*(np.arange(items.size) for items in lists), indexing="ij")
    crossed = [items[picks.ravel()] for items, picks in zip(lists, grid, strict=True)]
    total = -(-(crossed[0].size + count) // 16) * 16
    return [
        np.concatenate([head, random_bits(element, total - head.size, seed + 17 * i)])
        for i, (element, head) in enumerate(zip(elements, crossed, strict=True))
    ]


# --- the small float formats by their definition


@dataclass(frozen=True)
class Format:
    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int
    saturates: bool

    @property
    def numbers(self) -> NDArray[np.float64]:
        """Of the codes 0 to `largest`: the finite numbers that are not negative, in order."""
        return _numbers(self)


FORMATS = {
    "f16": Format(16, 10, 15, 0x7BFF, 0x7C00, 0x7E00, False),
    "bf16": Format(16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0, False),
    "f8E4M3FN": Format(8, 3, 7, 0x7E, None, 0x7F, True),
    "f8E5M2": Format(8, 2, 15, 0x7B, 0x7C, 0x7F, True),
}


@cache
def _numbers(form: Format) -> NDArray[np.float64]:
    codes = np.arange(form.largest + 1)
    exponent, fraction = codes >> form.mantissa, codes & ((1 << form.mantissa) - 1)
    significand = np.where(exponent > 0, fraction + (1 << form.mantissa), fraction)
    return np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - form.bias - form.mantissa)


def decode(array: Array, element: str) -> NDArray[np.float64]:
    """The numbers, exact in f64."""
    if element not in FORMATS:
        with np.errstate(invalid="ignore"):
            return array.astype(np.float64)
    form = FORMATS[element]
    codes = array.view(f"u{form.bits // 8}").astype(np.int64)
    magnitude = codes & ((1 << (form.bits - 1)) - 1)
    values = form.numbers[np.minimum(magnitude, form.largest)]
    values = np.where(magnitude > form.largest, np.nan, values)
    values = np.where(magnitude == form.infinity, np.inf, values) if form.infinity is not None else values
    return np.where(codes != magnitude, -values, values)


def encode(values: NDArray[np.float64], element: str, *, toward_zero: bool = False) -> Array:
    """Nearest, ties to even, or toward zero, by looking the numbers up."""
    if element == "f64":
        return values
    if element == "f32":
        return _single(values, toward_zero)
    form = FORMATS[element]
    magnitude, numbers = np.abs(np.nan_to_num(values, nan=0.0, posinf=1e300, neginf=-1e300)), form.numbers
    below = np.searchsorted(numbers, magnitude, side="right") - 1
    code = below
    if not toward_zero:
        magnitude = np.minimum(magnitude, 2 * numbers[-1])
        step = numbers[-1] - numbers[-2]
        above = np.append(numbers, numbers[-1] + step)
        doubled, middle = magnitude * 2, above[below] + above[below + 1]
        code = below + ((doubled > middle) | ((doubled == middle) & (below % 2 == 1)))
        code = np.minimum(code, form.largest) if form.saturates else code
    keeps = form.infinity is not None and (not form.saturates or toward_zero)
    code = np.where(np.isinf(values) & keeps, form.infinity or 0, code)
    code = np.where(np.isnan(values), form.nan, code + (np.signbit(values) << (form.bits - 1)))
    return code.astype(f"u{form.bits // 8}").view(DTYPES[element])


def _single(values: NDArray[np.float64], toward_zero: bool) -> Array:
    with np.errstate(all="ignore"):
        nearest = values.astype(np.float32)
    if not toward_zero:
        return nearest
    larger = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(larger, np.nextafter(nearest, np.float32(0)), nearest)


# --- comparisons


def assert_same(results: Sequence[Array], expected: Array, element: str, *, zeros: bool = True) -> None:
    """Bit for bit, but any NaN for a NaN; without `zeros` any zero for a zero."""
    for lanes, result in zip(LANES, results, strict=True):
        same = result == expected
        if element in FORMATS or expected.dtype.kind == "f":
            got, want = decode(result, element), decode(expected, element)
            signs = np.signbit(got) == np.signbit(want)
            same = ((got == want) & (signs | ((want == 0) & (not zeros)))) | (np.isnan(got) & np.isnan(want))
        (wrong,) = np.nonzero(~same)
        first = [(int(i), result[i], expected[i]) for i in wrong[:4]]
        assert not wrong.size, f"lanes {lanes}: {wrong.size} of {result.size} differ, (at, got, want) {first}"


def units_apart(result: Array, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of f32 from exact values in units of the last place; 0 where both are NaN, or as infinite."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.abs(np.where(np.isfinite(rounded), rounded, np.float32(3e38)))).astype(
            np.float64
        )
        distance = np.abs(result.astype(np.float64) - exact) / unit
    distance = np.where(
        np.isinf(rounded) | np.isinf(result), np.where(rounded == result, 0, np.inf), distance
    )
    return np.where(np.isnan(result) & np.isnan(exact), 0, np.where(np.isnan(distance), np.inf, distance))
