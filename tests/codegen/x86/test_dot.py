"""tl.dot of the x86 backend in isolation, against float64, at every level that this CPU has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from moecc.codegen.x86.amx import TilePlan
from moecc.codegen.x86.builder import Builder, V
from moecc.codegen.x86.dot import plan_dot
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over, Rows
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import LEVELS, supported_levels

sys.path.append(str(Path(__file__).parent))
from dot_harness import Dot, aligned, compile_function

DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i8": torch.int8,
    "i32": torch.int32,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2": torch.float8_e5m2,
}
EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "i32": 0.0}
ACCUMULATOR = {"i8": "i32", "f64": "f64"}


@cache
def compiled(shape: DotShape, level: str, a_over: Over, b_over: Over) -> Dot:
    return Dot(shape, level, a_over, b_over)


def random_matrix(rows: int, columns: int, element: str, generator: torch.Generator) -> torch.Tensor:
    if element == "i8":
        return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    numbers = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return numbers.to(DTYPES[element])


def scatter_rows(matrix: torch.Tensor, generator: torch.Generator, even: bool) -> tuple[object, torch.Tensor]:
    """The rows in memory poisoned with 0xFF, at even distances or shuffled with uneven ones; their addresses."""
    count, size = matrix.shape[0], matrix.shape[1] * matrix.element_size()
    slot = size + 128
    memory = torch.full((count * slot,), 0xFF, dtype=torch.uint8)
    order = torch.arange(count) if even else torch.randperm(count, generator=generator)
    shift = torch.zeros(count) if even else torch.randint(0, 64, (count,), generator=generator)
    starts = order * slot + shift.to(torch.int64) * matrix.element_size() % 64
    rows = matrix.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).reshape(count, size)
    for start, row in zip(starts.tolist(), rows, strict=True):
        memory[start : start + size] = row
    return memory, starts + memory.data_ptr()


def check(shape: DotShape, level: str, a_over: Over, b_over: Over, *, even: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dot = compiled(shape, level, a_over, b_over)
    a = random_matrix(shape.m, shape.k, shape.a, generator)
    b = random_matrix(shape.k, shape.n, shape.b, generator)
    rows = random_matrix(shape.m, shape.n, "f64", generator).to(DTYPES[shape.accumulator])
    start, wide_a, wide_b = rows.to(torch.float64, copy=True), a.double(), b.double()
    a_memory, a_pointers = scatter_rows(a if a_over == "outer" else a.T, generator, even)
    b_memory, b_pointers = scatter_rows(b.T if b_over == "outer" else b, generator, even)
    dot.scratch.fill_(0xFF)
    dot.sums.fill_(0xFF)
    dot(a_pointers, b_pointers, rows)
    del a_memory, b_memory
    expected = start + wide_a @ wide_b
    bound = EPSILON[shape.accumulator] + (shape.k + 2) * EPSILON[shape.sum_element] * 0.5
    allowed = bound * (start.abs() + wide_a.abs() @ wide_b.abs())
    difference = (rows.double() - expected).abs()
    assert bool((difference <= allowed).all()), f"largest difference {difference.max()}"


def row_addresses(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.data_ptr() + matrix.element_size() * matrix.stride(0) * torch.arange(matrix.shape[0])


ORIENTATIONS: list[tuple[Over, Over]] = [
    ("outer", "outer"),
    ("outer", "k"),
    ("k", "outer"),
    ("k", "k"),
]
SHAPES = [
    (1, 64, 128),
    (4, 32, 64),
    (8, 16, 256),
    (16, 16, 32),
    (16, 128, 64),
    (64, 64, 64),
    (128, 32, 16),
    (2, 4, 8),
    (64, 8, 512),
    (16, 32, 384),
    (1, 1, 1),
]


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("over", ORIENTATIONS, ids="-".join)
def test_bfloat_dot(level: str, size: tuple[int, int, int], over: tuple[Over, Over]) -> None:
    shape = DotShape(*size, "bf16", "bf16", "f32")
    check(shape, level, *over, even=True)
    check(shape, level, *over, even=False, seed=1)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("size", [(1, 32, 64), (32, 16, 8), (16, 64, 128), (16, 32, 384)], ids=str)
@pytest.mark.parametrize("element", ["f16", "f32", "f64", "i8", "f8E4M3FN", "f8E5M2"])
@pytest.mark.parametrize("over", ORIENTATIONS, ids="-".join)
def test_dot_of_elements(
    level: str, size: tuple[int, int, int], element: str, over: tuple[Over, Over]
) -> None:
    shape = DotShape(*size, element, element, ACCUMULATOR.get(element, "f32"))
    check(shape, level, *over, even=False)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("size", [(16, 64, 64), (64, 16, 32), (4, 8, 16)], ids=str)
def test_a_half_accumulator_is_rounded_after_every_dot(level: str, size: tuple[int, int, int]) -> None:
    check(DotShape(*size, "bf16", "bf16", "f16"), level, "outer", "outer", even=True)
    check(DotShape(*size, "f16", "f16", "f16"), level, "outer", "k", even=False)


@pytest.mark.parametrize("level", supported_levels())
def test_products_of_every_byte_are_exact(level: str) -> None:
    """-128 * -128 included."""
    shape = DotShape(16, 256, 64, "i8", "i8", "i32")
    dot = compiled(shape, level, "outer", "outer")
    b = torch.arange(-128, 128, dtype=torch.int8)[:, None].repeat(1, 64)
    a = torch.full((16, 64), -128, dtype=torch.int8)
    rows = torch.full((16, 256), 7, dtype=torch.int32)
    dot(row_addresses(a), row_addresses(b), rows)
    assert torch.equal(rows, 7 + a.int() @ b.int().T)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("element", ["f8E4M3FN", "f8E5M2", "bf16", "f16"])
def test_every_number_of_8_and_16_bits_times_one(level: str, element: str) -> None:
    """Infinities, NaNs and subnormals included; AMX takes subnormal bfloats for zeros, as the hardware defines."""
    bits = 8 if element.startswith("f8") else 16
    codes = torch.arange(1 << bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
    numbers = codes.view(DTYPES[element]).reshape(-1, 256)
    rows = torch.empty(1, 256)
    one = torch.ones(1, 1).to(DTYPES[element])
    dot = compiled(DotShape(1, 256, 1, element, element, "f32"), level, "outer", "k")
    for line in numbers:
        rows.zero_()
        dot(row_addresses(one), row_addresses(line[None]), rows)
        expected = line.float()[None]
        if dot.plan.uses_tiles:
            expected = torch.where(expected.abs() < torch.finfo(torch.float32).tiny, 0.0, expected)
        assert torch.equal(rows.nan_to_num(3.0), expected.nan_to_num(3.0))
        assert torch.equal(rows.isnan(), expected.isnan())


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("copy", [False, True])
def test_packed_operands_serve_several_products(level: str, copy: bool) -> None:
    """Two weights by the same activations, as the gate and the up projection."""
    shape = DotShape(32, 64, 128, "bf16", "bf16", "f32")
    plan = plan_dot(shape, LEVELS[level], a_over="outer", b_over="outer")
    if isinstance(plan, TilePlan):
        plan = replace(plan, copy=copy)
    generator = torch.Generator().manual_seed(2)
    a, gate, up = (random_matrix(rows, 128, "bf16", generator) for rows in (32, 64, 64))
    results = [torch.full((32, 64), float("nan")) for _ in range(2)]
    pointers = [row_addresses(matrix) for matrix in (a, gate, up)]
    sizes = (plan.a_bytes, plan.b_bytes, plan.b_bytes, plan.accumulator_bytes)
    buffers = [aligned(size) for size in sizes]
    tensors = [*pointers, *results, *buffers]
    run = compile_function(LEVELS[level], len(tensors), lambda b, p: share_a(b, plan, p))
    run(*(tensor.data_ptr() for tensor in tensors))
    for result, weight in zip(results, (gate, up), strict=True):
        torch.testing.assert_close(result.double(), 2 * a.double() @ weight.double().T, rtol=1e-5, atol=1e-3)


def share_a(b: Builder, plan: DotPlan, arguments: Sequence[V]) -> None:
    """Each result is twice the product."""
    a, gate, up, gate_rows, up_rows, packed_a, packed_gate, packed_up, sums = arguments
    plan.pack_a(b, Rows(a, 32, 128, "bf16"), packed_a)
    plan.pack_b(b, Rows(gate, 64, 128, "bf16"), packed_gate)
    plan.pack_b(b, Rows(up, 64, 128, "bf16"), packed_up)
    for packed, rows in ((packed_gate, gate_rows), (packed_up, up_rows)):
        plan.zero(b, sums)
        plan.multiply(b, packed_a, packed, sums)
        plan.multiply(b, packed_a, packed, sums)
        plan.to_rows(b, sums, rows)


@pytest.mark.parametrize("elements", [("i8", "i8", "f32"), ("i32", "i32", "i32"), ("f32", "f32", "bf16")])
def test_elements_that_no_dot_takes(elements: tuple[str, str, str]) -> None:
    with pytest.raises(UnsupportedError, match="a dot of .* is not supported; hint: floats add in fp32"):
        plan_dot(DotShape(16, 16, 32, *elements), LEVELS["avx2"], a_over="outer", b_over="k")


def test_sizes_are_powers_of_two() -> None:
    with pytest.raises(ValueError, match="48x32 by 32x16: m and n must be powers of two"):
        DotShape(48, 16, 32, "bf16", "bf16", "f32")
