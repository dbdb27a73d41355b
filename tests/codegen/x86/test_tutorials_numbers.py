# mypy: ignore-errors
"""Random numbers word by word, and the matrix tutorial on 8-bit floats and other blocks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
import tutorial_kernels as kernels
from guarded import Guarded, assert_close

pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]
LEVELS = pytest.mark.parametrize("level", supported_levels())


def philox(seed: int, counters: np.ndarray, rounds: int = 10) -> np.ndarray:
    """First word of Philox 4x32 (Salmon et al., 2011) for 32-bit counters in the first place."""
    c = [counters.astype(np.uint32), *(np.zeros_like(counters, dtype=np.uint32) for _ in range(3))]
    key = [np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)]
    with np.errstate(over="ignore"):
        for _ in range(rounds):
            a = c[0].astype(np.uint64) * np.uint64(0xD2511F53)
            b = c[2].astype(np.uint64) * np.uint64(0xCD9E8D57)
            high_a, high_b = (item >> np.uint64(32) for item in (a, b))
            c = [
                high_b.astype(np.uint32) ^ c[1] ^ key[0],
                b.astype(np.uint32),
                high_a.astype(np.uint32) ^ c[3] ^ key[1],
                a.astype(np.uint32),
            ]
            key = [key[0] + np.uint32(0x9E3779B9), key[1] + np.uint32(0xBB67AE85)]
    return c[0]


@LEVELS
@pytest.mark.parametrize("seed", [123, 0x123456789ABC])
def test_what_is_dropped_is_what_philox_says(level: str, seed: int) -> None:
    x, out = torch.randn(1000), Guarded(1000)
    with activated(level):
        kernels.drop_out[(2,)](x, out.tensor, 1000, 0.3, seed, 512)
    bits = philox(seed, np.arange(1000)).astype(np.int32)
    uniform = np.where(bits < 0, -bits.astype(np.int64) - 1, bits) * 4.6566127342e-10
    keep = torch.from_numpy(uniform > 0.3)
    assert_close(out.result(), torch.where(keep, x.double() / 0.7, 0.0), 1e-6)


def multiply(a: torch.Tensor, b: torch.Tensor, block_m: int, block_n: int, block_k: int) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = Guarded(m, n)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    strides = (*a.stride(), *b.stride(), n, 1)
    kernels.multiply_matrices[grid](a, b, out.tensor, m, n, k, *strides, block_m, block_n, block_k, 3, "")
    return out.result()


@LEVELS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_small_floats_are_multiplied(level: str, dtype: torch.dtype, transposed: bool) -> None:
    a = torch.randn(33, 70).to(dtype)
    b = torch.randn(48, 70).to(dtype).T if transposed else torch.randn(70, 48).to(dtype)
    with activated(level):
        found = multiply(a, b, 16, 32, 32)
    assert_close(found, a.double() @ b.double(), 2e-6)


@LEVELS
@pytest.mark.parametrize("blocks", [(16, 16, 16), (64, 128, 64), (128, 32, 16), (16, 256, 128)], ids=str)
def test_other_blocks(level: str, blocks: tuple[int, int, int]) -> None:
    a, b = torch.randn(130, 256).bfloat16(), torch.randn(256, 257).bfloat16()
    with activated(level):
        found = multiply(a, b, *blocks)
    assert_close(found, a.double() @ b.double(), 2e-6)


@triton.jit
def random_kernel(uniform_ptr, normal_ptr, integer_ptr, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(uniform_ptr + offsets, tl.rand(seed, offsets))
    tl.store(normal_ptr + offsets, tl.randn(seed, offsets))
    a, b, c, d = tl.randint4x(seed, offsets)
    tl.store(integer_ptr + offsets, a ^ b ^ c ^ d)


def test_levels_draw_the_same_numbers() -> None:
    drawn = []
    for name in supported_levels():
        outputs = Guarded(4096), Guarded(4096), Guarded(4096, dtype=torch.int32)
        with activated(name):
            random_kernel[(1,)](*(output.tensor for output in outputs), 42, BLOCK=4096)
        drawn.append([output.result() for output in outputs])
    uniform, normal, _ = drawn[0]
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(normal.std() - 1) < 0.03
    for other in drawn[1:]:
        assert torch.equal(other[0], uniform)
        assert torch.equal(other[2], drawn[0][2])
        assert_close(other[1], normal, 1e-6)
