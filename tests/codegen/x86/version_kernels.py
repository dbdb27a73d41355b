"""Run by each version of Triton, alone: no torch, arrays of NumPy with an address."""

from __future__ import annotations

import sys

import numpy as np
import triton
import triton.language as tl


class Array:
    """What Triton asks of a tensor."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.dtype = values.dtype
        self.shape = values.shape

    def data_ptr(self) -> int:
        return self.values.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.values.itemsize for step in self.values.strides)


@triton.jit
def vadd(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def matmul(x, w, o, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(x + m[:, None] * K + (start + k)[None, :])
        b = tl.load(w + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(o + m[:, None] * N + n[None, :], acc + tl.sum(acc, 1)[:, None])


def check_vadd(random: np.random.Generator) -> None:
    x, y = random.standard_normal((2, 1000), dtype=np.float32)
    o = np.full(1000, np.nan, np.float32)
    vadd[(8,)](Array(x), Array(y), Array(o), 1000, B=128)
    assert (o == x + y).all()


def check_matmul(random: np.random.Generator, dtype: type) -> None:
    x, w = (random.standard_normal(shape).astype(dtype) for shape in ((16, 64), (64, 32)))
    o = np.full((16, 32), np.nan, np.float32)
    matmul[(1,)](Array(x), Array(w), Array(o), 64, M=16, N=32, BK=32)
    product = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(o, product + product.sum(1, keepdims=True), rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    seeded = np.random.default_rng(int(sys.argv[1]))
    check_vadd(seeded)
    check_matmul(seeded, np.float32)
    check_matmul(seeded, np.float16)
    assert "torch" not in sys.modules
    print(triton.__version__)
