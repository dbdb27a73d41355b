"""Rows that every store masks off are not multiplied, and that cannot be seen."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")
N, K = 128, 96
POISON = 7.0


@triton.jit
def masked_product(
    a_ptr,
    b_ptr,
    is_row_ptr,
    c_ptr,
    sums_ptr,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKS_LATE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """c = sigmoid(a @ b) where rows and columns are inside; SUMS reads every row besides."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    if not MASKS_LATE:
        is_row = tl.load(is_row_ptr + m) != 0
    a_ptrs = a_ptr + m[:, None] * K + k[None, :]
    b_ptrs = b_ptr + n[None, :] * K + k[:, None]
    total = tl.zeros([M, N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    if MASKS_LATE:
        is_row = tl.load(is_row_ptr + m) != 0
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, tl.sigmoid(total) * 2.0, is_row[:, None] & (n < columns)[None, :])
    if SUMS:
        tl.store(sums_ptr + n, tl.sum(total, 0))


def check(
    level: str, rows: torch.Tensor, *, block_k: int = 32, late: bool = False, sums: bool = False
) -> None:
    """`rows` says which rows are stored; those that are not hold NaN where nothing else reads them."""
    m, columns = len(rows), 100
    a, b = torch.randn(m, K).bfloat16(), torch.randn(N, K).bfloat16()
    if not sums:
        a[~rows] = float("nan")
    c, totals = torch.full((m, N), POISON), torch.full((N,), float("nan"))
    with activated(level):
        masked_product[(1,)](a, b, rows.int(), c, totals, columns, m, N, K, block_k, late, sums)
    product = a.double() @ b.double().T
    expected = torch.full((m, N), POISON, dtype=torch.float64)
    expected[rows, :columns] = 2 * torch.sigmoid(product)[rows, :columns]
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
    if sums:
        torch.testing.assert_close(totals.double(), product.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("m", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("used", [0, 1, 16, 17, 79, 96, 97, 112, 128])
def test_the_last_rows_are_masked_off(level: str, m: int, used: int) -> None:
    check(level, torch.arange(m) < used)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("block_k", [32, 16])
def test_any_rows_are_masked_off(level: str, late: bool, block_k: int) -> None:
    generator = torch.Generator().manual_seed(block_k)
    for chance in (0.05, 0.5):
        check(level, torch.rand(128, generator=generator) < chance, block_k=block_k, late=late)


@pytest.mark.parametrize("level", supported_levels())
def test_another_reader_sees_every_row(level: str) -> None:
    check(level, torch.arange(64) < 20, sums=True)


@triton.jit
def two_masks(a_ptr, b_ptr, c_ptr, d_ptr, first, second, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    is_first, is_second = m < first, m < second
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    product = tl.dot(a, tl.load(b_ptr + n[None, :] * K + k[:, None]))
    at = m[:, None] * N + n[None, :]
    tl.store(c_ptr + at, product, is_first[:, None])
    tl.store(d_ptr + at, product, is_second[:, None] & is_first[:, None])


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("second", [0, 30, 64])
def test_a_row_that_any_store_takes_is_computed(level: str, second: int) -> None:
    a, b, first = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), 50
    c, d = torch.full((2, 64, 64), POISON)
    with activated(level):
        two_masks[(1,)](a, b, c, d, first, second, 64, 64, 64)
    product = (a.double() @ b.double().T).float()
    for stored, used in ((c, first), (d, min(first, second))):
        torch.testing.assert_close(stored[:used], product[:used], rtol=1e-5, atol=1e-4)
        assert bool((stored[used:] == POISON).all())
