# mypy: ignore-errors
"""A tile is read as a whole before any of it is written: elements of one address, and reads that other ops overtake."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with activated(request.param):
        yield


@triton.jit
def raise_clamped(x_ptr, n, SIZE: tl.constexpr):
    at = x_ptr + tl.minimum(tl.arange(0, SIZE), n - 1)
    tl.store(at, tl.load(at) + 1)


@triton.jit
def raise_repeated(x_ptr, n, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE) % n
    tl.store(at, tl.load(at) + 1)


@triton.jit
def raise_by_rows(x_ptr, n, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)[:, None] * 0 + tl.arange(0, 16)[None, :]
    tl.store(at, tl.load(at) + 1)


@pytest.mark.parametrize("kernel", [raise_clamped, raise_repeated, raise_by_rows], ids=lambda k: k.__name__)
@pytest.mark.parametrize("size", [16, 64, 256])
def test_an_address_that_a_tile_has_often_is_raised_once(kernel: object, size: int) -> None:
    x = torch.zeros(300)
    kernel[(1,)](x, 16, SIZE=size)
    assert torch.equal(x, (torch.arange(300) < 16).float())


@triton.jit
def raise_rows(x_ptr, stride, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, SIZE)[None, :]
    tl.store(at, tl.load(at) * 2 + 1)


@pytest.mark.parametrize("stride", [1, 3, 31, 32, 40])
def test_rows_that_overlap(stride: int) -> None:
    x = torch.randn(32 * 41)
    touched = (torch.arange(32)[:, None] * stride + torch.arange(32)).unique()
    expected = x.clone()
    expected[touched] = x[touched] * 2 + 1
    raise_rows[(1,)](x, stride, SIZE=32)
    assert torch.equal(x, expected)


@triton.jit
def read_other_type(x_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store((x_ptr + at).to(tl.pointer_type(tl.int32), bitcast=True), tl.zeros((SIZE,), tl.int32))
    tl.store(x_ptr + SIZE + at, x)


def test_a_store_of_another_type() -> None:
    x = torch.randn(128)
    expected = torch.cat([torch.zeros(64), x[:64]])
    read_other_type[(1,)](x, SIZE=64)
    assert torch.equal(x, expected)


@triton.jit
def store_one(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    before = tl.load(x_ptr + at)
    if n > 3:
        tl.store(x_ptr + 5, 99.0)
    tl.store(out_ptr + at, before)
    tl.store(out_ptr + SIZE + at, tl.load(x_ptr + at))


@pytest.mark.parametrize("n", [1, 5])
def test_a_scalar_is_stored_in_a_branch(n: int) -> None:
    x, out = torch.randn(64), torch.zeros(128)
    before, after = x.clone(), x.clone()
    if n > 3:
        after[5] = 99
    store_one[(1,)](x, out, n, SIZE=64)
    assert torch.equal(out, torch.cat([before, after]))


@triton.jit
def read_ahead(x_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    """Software pipelining: a round stores over what the last one read."""
    at = tl.arange(0, SIZE)
    ahead = tl.load(x_ptr + at)
    for i in range(rounds):
        tl.store(x_ptr + at, ahead * 0 + i)
        tl.store(out_ptr + i * SIZE + at, ahead)
        ahead = tl.load(x_ptr + at) + 10
    tl.store(out_ptr + rounds * SIZE + at, ahead)


def test_reads_for_the_next_round() -> None:
    x, out = torch.randn(64), torch.zeros(5, 64)
    expected = torch.stack([x.clone(), *(torch.full((64,), 10.0 + i) for i in range(4))])
    read_ahead[(1,)](x, out, 4, SIZE=64)
    assert torch.equal(out, expected)


@triton.jit
def change_while(x_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    i = 0
    x = tl.load(x_ptr + at)
    while i < rounds:
        tl.store(x_ptr + at, x + 1)
        turned = tl.load(x_ptr + (at + 1) % SIZE)
        tl.store(x_ptr + at, turned)
        x = tl.load(x_ptr + at) * 2
        i += 1
    tl.store(x_ptr + at, x)


def test_a_while_loop_reads_what_it_wrote() -> None:
    x = torch.randint(-9, 9, (64,)).float()
    expected = x.clone()
    for _ in range(3):
        expected = (expected + 1).roll(-1) * 2
    change_while[(1,)](x, 3, SIZE=64)
    assert torch.equal(x, expected)


@triton.jit(noinline=True)
def overwrite(x_ptr, value, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), tl.full((SIZE,), 0.0, tl.float32) + value)


@triton.jit
def call_between(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    before = tl.load(x_ptr + at)
    overwrite(x_ptr, 7.0, SIZE)
    tl.store(out_ptr + at, before + tl.load(x_ptr + at))


def test_a_function_writes() -> None:
    x, out = torch.randn(64), torch.zeros(64)
    expected = x + 7
    call_between[(1,)](x, out, SIZE=64)
    assert torch.equal(out, expected)


@triton.jit
def overwrite_operands(x_ptr, w_ptr, out_ptr, rounds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    w = tl.load(w_ptr + at)
    for _ in range(rounds):
        x = tl.load(x_ptr + at)
        acc = tl.dot(x, w, acc)
        tl.store(x_ptr + at, x + 1)
        tl.store(w_ptr + at, acc)
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), w, acc))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_operands_of_products_are_overwritten(rounds: int) -> None:
    x, w = torch.randint(-3, 4, (2, 32, 32)).float()
    out, first, last = torch.zeros(32, 32), w.clone(), x + rounds
    products = [(x + i) @ w for i in range(rounds + 1)]
    overwrite_operands[(1,)](x, w, out, rounds, SIZE=32)
    assert torch.equal(out, sum(products))
    assert torch.equal(x, last)
    assert torch.equal(w, sum(products[:-1]) if rounds else first)


@triton.jit
def store_product_over_operand(x_ptr, w_ptr, SIZE: tl.constexpr):
    """All of k is one product, and goes over the operand's first block."""
    at = tl.arange(0, SIZE)
    x, w = x_ptr + at[:, None] * 128 + at[None, :], w_ptr + at[None, :] * 128 + at[:, None]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(0, 128, SIZE):
        acc = tl.dot(tl.load(x), tl.load(w), acc)
        x += SIZE
        w += SIZE
    tl.store(x_ptr + at[:, None] * 128 + at[None, :], acc)
    tl.store(w_ptr + at[:, None] * 128 + at[None, :], tl.load(x - SIZE))


def test_a_product_goes_over_its_operand() -> None:
    x, w = torch.randint(-3, 4, (2, 32, 128)).float()
    right_x, right_w = x.clone(), w.clone()
    right_x[:, :32] = x @ w.T
    right_w[:, :32] = right_x[:, 96:]
    store_product_over_operand[(1,)](x, w, SIZE=32)
    assert torch.equal(x, right_x)
    assert torch.equal(w, right_w)


@triton.jit
def raise_by_neighbours(x_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    neighbour = tl.load(x_ptr + (at + 1) % SIZE)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + 1, mask=neighbour > 0)


def test_a_mask_read_from_what_is_written() -> None:
    x = torch.randn(64)
    expected = torch.where(x.roll(-1) > 0, x + 1, x)
    raise_by_neighbours[(1,)](x, SIZE=64)
    assert torch.equal(x, expected)


@triton.jit
def count_often(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    before = tl.load(x_ptr + at)
    old = tl.atomic_add(x_ptr + at % 4, 1)
    tl.store(out_ptr + at, before)
    tl.store(out_ptr + SIZE + at, tl.load(x_ptr + at))
    tl.store(out_ptr + 2 * SIZE + at, old)


def test_an_atomic_between_reads() -> None:
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(3, 64, dtype=torch.int32)
    count_often[(1,)](x, out, SIZE=64)
    assert not out[0].any()
    assert torch.equal(out[1], 16 * (torch.arange(64) < 4))
    # Which of the elements of one address comes first is open; each number is drawn once.
    assert torch.equal(out[2].reshape(16, 4).sort(0)[0], torch.arange(16)[:, None].expand(16, 4).int())


@triton.jit
def shift_past_the_end(out_ptr, start, rounds, SIZE: tl.constexpr):
    at = start + tl.arange(0, SIZE)
    for i in range(rounds):
        tl.store(out_ptr + i * SIZE + tl.arange(0, SIZE), at.to(tl.int64))
        at += 7


def test_a_carried_offset_wraps() -> None:
    start, out = 2**31 - 70, torch.zeros(4, 64, dtype=torch.int64)
    shift_past_the_end[(1,)](out, start, 4, SIZE=64)
    exact = torch.arange(64) + start + 7 * torch.arange(4)[:, None]
    assert torch.equal(out, (exact + 2**31) % 2**32 - 2**31)


@triton.jit
def read_by_bytes(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = (tl.arange(0, SIZE) * 3).to(tl.int8)
    tl.store(out_ptr + tl.arange(0, SIZE), tl.load(x_ptr + at))


def test_offsets_of_eight_bits_wrap() -> None:
    x, out = torch.arange(256.0), torch.zeros(256)
    read_by_bytes[(1,)](x[128:], out, SIZE=256)
    assert torch.equal(out, x[torch.arange(256) * 3 % 256 - 256 * (torch.arange(256) * 3 % 256 > 127) + 128])
