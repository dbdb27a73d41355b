# mypy: ignore-errors
"""Tiles that loops and branches hand on: exchanged, turned, of several shapes, accumulated by dots and read in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from guarded import Guarded

pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]
SIZE = 32


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with activated(request.param):
        yield


def small_integers() -> torch.Tensor:
    """Sums and products of them are exact in float32."""
    return torch.randint(-2, 3, (SIZE, SIZE)).float()


@triton.jit
def turn_and_sum(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x_ptr + at)
    b = tl.trans(a)
    for i in range(rounds):
        a, b = tl.trans(b) + i, tl.cumsum(a, 1)
    tl.store(out_ptr + at, a)
    tl.store(out_ptr + SIZE * SIZE + at, b)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_tiles_are_exchanged_and_turned(rounds: int) -> None:
    x, out = small_integers(), Guarded(2, SIZE, SIZE)
    turn_and_sum[(1,)](x, out.tensor, rounds, SIZE=SIZE)
    a, b = x, x.T
    for i in range(rounds):
        a, b = b.T + i, a.cumsum(1)
    assert torch.equal(out.result(), torch.stack([a, b]))


@triton.jit
def exchange_shapes(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    r = tl.arange(0, SIZE)
    at = r[:, None] * SIZE + r[None, :]
    a, row, column = tl.load(x_ptr + at), tl.load(x_ptr + r)[None, :], tl.load(x_ptr + r)[:, None]
    for _ in range(rounds):
        a = a + row * column
        row, column = tl.trans(column) + 1, tl.trans(row) - 1
    tl.store(out_ptr + at, a + row - column)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_row_and_a_column_are_exchanged(rounds: int) -> None:
    x, out = small_integers(), Guarded(SIZE, SIZE)
    exchange_shapes[(1,)](x, out.tensor, rounds, SIZE=SIZE)
    a, row, column = x, x[:1], x[:1].T
    for _ in range(rounds):
        a = a + row * column
        row, column = column.T + 1, row.T - 1
    assert torch.equal(out.result(), a + row - column)


@triton.jit
def exchange_accumulators(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    a = tl.zeros((SIZE, SIZE), tl.float32)
    b = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(rounds):
        a = tl.dot(x, x, a)
        a, b = b, a
        b = b * 0.5
    tl.store(out_ptr + at, a)
    tl.store(out_ptr + SIZE * SIZE + at, b)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_sums_of_products_are_exchanged(rounds: int) -> None:
    x, out = small_integers(), Guarded(2, SIZE, SIZE)
    exchange_accumulators[(1,)](x, out.tensor, rounds, SIZE=SIZE)
    a = b = torch.zeros(SIZE, SIZE)
    for _ in range(rounds):
        a, b = b, (a + x @ x) * 0.5
    assert torch.equal(out.result(), torch.stack([a, b]))


@triton.jit
def multiply_what_is_summed(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    total = x
    for _ in range(rounds):
        total = tl.dot(total, x, total)
    tl.store(out_ptr + at, total)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_sum_of_products_is_an_operand_of_the_next(rounds: int) -> None:
    x, out = small_integers().clamp(-1, 1), Guarded(SIZE, SIZE)
    multiply_what_is_summed[(1,)](x, out.tensor, rounds, SIZE=SIZE)
    total = x
    for _ in range(rounds):
        total = total + total @ x
    assert torch.equal(out.result(), total)


@triton.jit
def exchange_in_branches(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x_ptr + at)
    b = a * 2
    for i in range(rounds):
        if tl.sum(a, 0) > 0:
            if i % 2 == 0:
                a, b = b, a
            else:
                a = tl.flip(b, 0)
        else:
            b = b - a
            a = a + 1
    tl.store(out_ptr + at, a)
    tl.store(out_ptr + SIZE + at, b)


@pytest.mark.parametrize("rounds", range(6))
@pytest.mark.parametrize("sign", [-1, 1])
def test_tiles_are_exchanged_in_branches(rounds: int, sign: int) -> None:
    x, out = sign * torch.arange(SIZE).float(), Guarded(2, SIZE)
    exchange_in_branches[(1,)](x, out.tensor, rounds, SIZE=SIZE)
    a, b = x, 2 * x
    for i in range(rounds):
        if a.sum() <= 0:
            a, b = a + 1, b - a
        elif i % 2 == 0:
            a, b = b, a
        else:
            a = b.flip(0)
    assert torch.equal(out.result(), torch.stack([a, b]))


@triton.jit
def count_rounds(out_ptr, low, high):
    down = 0
    for i in range(high, low, -3):
        down = down * 7 + i
    up = low.to(tl.int64) * 0
    for i in range(low.to(tl.int64), high.to(tl.int64), 2):
        up = up * 3 + i
    tl.store(out_ptr, down)
    tl.store(out_ptr + 1, up)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (5, 5), (7, 2), (-5, 6)])
def test_loops_up_and_down(low: int, high: int) -> None:
    out = Guarded(2, dtype=torch.int64)
    count_rounds[(1,)](out.tensor, low, high)
    down = up = 0
    for i in range(high, low, -3):
        down = down * 7 + i
    for i in range(low, high, 2):
        up = up * 3 + i
    assert out.result().tolist() == [down, up]


@triton.jit(noinline=True)
def large_product(x_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    return tl.dot(x, tl.trans(x)), tl.sum(x, 1)


@triton.jit
def call_with_large_tiles(x_ptr, out_ptr, SIZE: tl.constexpr):
    program, rows = tl.program_id(0), tl.arange(0, SIZE)
    product, sums = large_product(x_ptr + program * SIZE * SIZE, SIZE)
    again, _ = large_product(x_ptr, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    tl.store(out_ptr + program * SIZE * SIZE + at, product + again + sums[:, None])


def test_a_function_returns_large_tiles() -> None:
    x = torch.randint(-2, 3, (4, 256, 256)).float()
    out = Guarded(4, 256, 256)
    call_with_large_tiles[(4,)](x, out.tensor, SIZE=256)
    products = x @ x.transpose(1, 2)
    assert torch.equal(out.result(), products + products[:1] + x.sum(2, keepdim=True))
