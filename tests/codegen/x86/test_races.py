"""What a program reads is what was there when it read: stores that alias later and earlier loads, offsets that wrap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with activated(request.param):
        yield


@triton.jit
def move(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, at < size) * 2, at < size)


@pytest.mark.parametrize("by", [-40, -16, -1, 0, 1, 3, 16, 40])
def test_a_tile_is_read_before_it_is_written_elsewhere(by: int) -> None:
    memory = torch.randn(400)
    expected = memory.clone()
    expected[100 + by : 300 + by] = memory[100:300] * 2
    move[(1,)](memory[100:], memory[100 + by :], 200, 256)
    assert torch.equal(memory, expected)


@triton.jit
def turn_round(x_ptr, size: tl.constexpr):
    at = tl.arange(0, size)
    x = tl.load(x_ptr + at)
    y = tl.load(x_ptr + size - 1 - at)
    tl.store(x_ptr + at, y)
    tl.store(x_ptr + size + at, x)


def test_a_tile_is_turned_round_in_place() -> None:
    memory = torch.randn(256)
    expected = torch.cat([memory[:128].flip(0), memory[:128]])
    turn_round[(1,)](memory, 128)
    assert torch.equal(memory, expected)


@triton.jit
def transpose_in_place(x_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + row * SIZE + column)
    tl.store(x_ptr + row * SIZE + column, tl.trans(x))


def test_a_matrix_is_transposed_in_place() -> None:
    memory = torch.randn(32, 32)
    expected = memory.T.clone()
    transpose_in_place[(1,)](memory, 32)
    assert torch.equal(memory, expected)


@triton.jit
def read_write_read(x_ptr, first_ptr, second_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + at)
    tl.store(x_ptr + at, first + 1)
    second = tl.load(x_ptr + at)
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def test_reads_on_both_sides_of_a_write() -> None:
    x = torch.randn(64)
    before, first, second = x.clone(), torch.zeros(64), torch.zeros(64)
    read_write_read[(1,)](x, first, second, 64)
    assert torch.equal(first, before)
    assert torch.equal(second, before + 1)


@triton.jit
def scan_in_memory(x_ptr, rounds, BLOCK: tl.constexpr):
    """Every round reads what the last one wrote."""
    at = tl.arange(0, BLOCK)
    for i in range(rounds):
        here = tl.load(x_ptr + i * BLOCK + at)
        tl.store(x_ptr + (i + 1) * BLOCK + at, here + tl.load(x_ptr + (i + 1) * BLOCK + at))


def test_rounds_read_what_earlier_ones_wrote() -> None:
    x = torch.randn(9, 32, dtype=torch.float64)
    expected = x.cumsum(0)
    scan_in_memory[(1,)](x, 8, 32)
    torch.testing.assert_close(x, expected)


@triton.jit
def look_up_and_overwrite(index_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at)
    tl.store(index_ptr + index, at)


def test_indices_are_read_before_they_are_overwritten() -> None:
    permutation = torch.randperm(128, dtype=torch.int32)
    expected = permutation.argsort().int()
    look_up_and_overwrite[(1,)](permutation, 128)
    assert torch.equal(permutation, expected)


@triton.jit
def count_then_read(counter_ptr, before_ptr, after_ptr):
    before = tl.load(counter_ptr + tl.arange(0, 2))
    old = tl.atomic_add(counter_ptr, 5)
    after = tl.load(counter_ptr + tl.arange(0, 2))
    tl.store(before_ptr + tl.arange(0, 2), before + old * 100)
    tl.store(after_ptr + tl.arange(0, 2), after)


def test_loads_stay_on_their_side_of_an_atomic() -> None:
    counter, before, after = (torch.tensor([3, 4], dtype=torch.int32) for _ in range(3))
    count_then_read[(1,)](counter, before, after)
    assert before.tolist() == [303, 304]
    assert after.tolist() == [8, 4]


@triton.jit
def swap_carried(x_ptr, y_ptr, rounds, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + at), tl.load(y_ptr + at)
    total = tl.sum(a, axis=0)
    for _ in range(rounds):
        a, b = b, a + tl.sum(b, axis=0)
        total += tl.sum(a, axis=0)
    tl.store(x_ptr + at, a + total)
    tl.store(y_ptr + at, b)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_tiles_that_a_loop_exchanges(rounds: int) -> None:
    x, y = torch.rand(2, 32, dtype=torch.float64)
    a, b, total = x.clone(), y.clone(), x.sum()
    for _ in range(rounds):
        a, b = b, a + b.sum()
        total = total + a.sum()
    swap_carried[(1,)](x, y, rounds, 32)
    torch.testing.assert_close(x, a + total)
    torch.testing.assert_close(y, b)


@triton.jit
def offsets_as_numbers(out_ptr, first, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), at.to(tl.int64))


def test_integers_wrap_before_they_are_widened() -> None:
    out = torch.zeros(64, dtype=torch.int64)
    first = 2**31 - 20
    offsets_as_numbers[(1,)](out, first, 64)
    expected = (torch.arange(64) + first + 2**31) % 2**32 - 2**31
    assert torch.equal(out, expected)


@triton.jit
def masked_where_it_wraps(x_ptr, out_ptr, first, last, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    inside = (at >= first) & (at < last)
    tl.store(out_ptr + at - first, tl.load(x_ptr - first + at, inside, other=-1.0), inside)


def test_lanes_that_wrap_are_not_touched_where_they_are_masked() -> None:
    x, out = torch.randn(8), torch.full((8,), -2.0)
    first = 2**31 - 8
    masked_where_it_wraps[(1,)](x, out, first, 2**31 - 1, 64)
    assert torch.equal(out[:7], x[:7])
    assert out[7] == -2.0


@triton.jit
def read_behind(middle_ptr, out_ptr, first, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(middle_ptr + at))


@pytest.mark.slow
def test_an_offset_that_wraps_points_behind_the_pointer() -> None:
    memory = torch.zeros(2**32, dtype=torch.int8)
    memory[: 2**20] = 7
    memory[-(2**20) :] = 3
    out = torch.zeros(64, dtype=torch.int8)
    read_behind[(1,)](memory[2**31 :], out, 2**31 - 32, 64)
    assert out.tolist() == [3] * 32 + [7] * 32


@triton.jit
def number_programs(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + at, x + 10 * y + 100 * z)


def test_grids_have_three_axes() -> None:
    out = torch.full((4, 3, 5), -1, dtype=torch.int32)
    number_programs[(5, 3, 4)](out)
    x, y, z = torch.arange(5), torch.arange(3)[:, None], torch.arange(4)[:, None, None]
    assert torch.equal(out, (x + 10 * y + 100 * z).int())
