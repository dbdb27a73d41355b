"""A loop over blocks of k becomes one dot over all of k where nothing else happens in it, and only there."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")
M, N, K = 32, 64, 96


@triton.jit
def two_products(
    a_ptr,
    b_ptr,
    c_ptr,
    sums_ptr,
    differences_ptr,
    last,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    START: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * K + k[None, :]
    b_ptrs = b_ptr + n[None, :] * K + k[:, None]
    c_ptrs = c_ptr + n[None, :] * K + k[:, None]
    sums = tl.full([M, N], START, tl.float32)
    differences = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < last)[None, :]
        a = tl.load(a_ptrs, mask=inside, other=0.0) if MASKED else tl.load(a_ptrs)
        sums = tl.dot(a, tl.load(b_ptrs), sums, input_precision="ieee")
        differences = tl.dot(a, tl.load(c_ptrs), differences, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
        c_ptrs += BLOCK_K
    at = m[:, None] * N + n[None, :]
    tl.store(sums_ptr + at, sums)
    tl.store(differences_ptr + at, differences)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("rows", [1, 2, 16, M])
def test_the_sum_is_that_of_all_blocks(level: str, dtype: torch.dtype, masked: bool, rows: int) -> None:
    a, b, c = (torch.randn(size, K).to(dtype) for size in (rows, N, N))
    sums, differences = torch.full((2, rows, N), float("nan"))
    last = 70
    with activated(level):
        compiled = two_products[(1,)](a, b, c, sums, differences, last, rows, N, K, 32, masked, 0.5)
    whole = f"{rows}x{N}x{K}" in compiled.asm["llvm"] or f"x{K}." in compiled.asm["llvm"]
    assert whole is not masked
    seen = a.double() * ((torch.arange(K) < last) if masked else 1.0)
    torch.testing.assert_close(sums.double(), seen @ b.double().T + 0.5, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(differences.double(), seen @ c.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("depth", "block"), [(384, 128), (48, 16), (24, 8)])
def test_depths_that_are_no_power_of_two(level: str, dtype: torch.dtype, depth: int, block: int) -> None:
    a, b, c = (torch.randn(size, depth).to(dtype) for size in (16, N, N))
    sums, differences = torch.full((2, 16, N), float("nan"))
    with activated(level):
        two_products[(1,)](a, b, c, sums, differences, depth, 16, N, depth, block, False, 0.5)
    torch.testing.assert_close(sums.double(), a.double() @ b.double().T + 0.5, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(differences.double(), a.double() @ c.double().T, rtol=1e-5, atol=1e-4)
