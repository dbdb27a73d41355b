"""tl.dot of the x86 backend in isolation, against float64, at every level that this CPU has."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from moecc.codegen.x86.dot_shape import DotShape, Over
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from dot_harness import Dot

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
@pytest.mark.parametrize("size", [(1, 32, 64), (16, 32, 128), (32, 16, 8), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("element", ["f16", "f32", "f64", "i8", "f8E4M3FN", "f8E5M2"])
@pytest.mark.parametrize("over", ORIENTATIONS, ids="-".join)
def test_dot_of_elements(
    level: str, size: tuple[int, int, int], element: str, over: tuple[Over, Over]
) -> None:
    shape = DotShape(*size, element, element, ACCUMULATOR.get(element, "f32"))
    check(shape, level, *over, even=False)
