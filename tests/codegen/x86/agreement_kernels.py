# mypy: ignore-errors
"""Run alone, natively or interpreted: every kernel on the same numbers, the results into a file."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic(x, y, i, j, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.where(a > b, tl.exp(-tl.abs(a)) * b, tl.sqrt(tl.abs(b)) / (tl.abs(a) + 1)))
    tl.store(out + SIZE + at, tl.math.floor(a * 3) + tl.math.fma(a, b, a) - tl.sigmoid(b))
    tl.store(out + 2 * SIZE + at, (a.to(tl.float16) * b.to(tl.float16)).to(tl.float32))
    tl.store(out + 3 * SIZE + at, a.to(tl.float64).to(tl.float32) + a.to(tl.int32) + b.to(tl.int8))
    m, n = tl.load(i + at), tl.load(j + at)
    mixed = (m ^ n) + (m << 3) - (n >> 2) + m // (n | 1) + m % (n | 1)
    tl.store(out + 4 * SIZE + at, (mixed & 0xFFFF).to(tl.float32))
    tl.store(out + 5 * SIZE + at, tl.minimum(a, b) + tl.maximum(m, n) % 1000 + tl.clamp(a, -0.5, 0.5))


@triton.jit
def meeting(x, y, i, j, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, m = tl.load(x + at), tl.load(i + at)
    tile = tl.reshape(a, (SIZE // 16, 16))
    best, where = tl.max(tile, 1, return_indices=True)
    rows = tl.arange(0, SIZE // 16)
    tl.store(out + rows, best)
    tl.store(out + SIZE + rows, where.to(tl.float32))
    tl.store(out + 2 * SIZE + at, tl.cumsum(m, 0).to(tl.float32))
    tl.store(out + 3 * SIZE + at, tl.ravel(tl.trans(tile)))
    tl.store(out + 4 * SIZE + at, tl.sort(a))
    tl.store(out + 5 * SIZE + at, tl.flip(a, 0))
    tl.store(
        out + 6 * SIZE + at,
        tl.ravel(tl.min(tile, 0, keep_dims=True) + tl.zeros((SIZE // 16, 16), tl.float32)),
    )
    tl.store(out + 7 * SIZE + tl.arange(0, 2 * SIZE), tl.interleave(a, tl.load(y + at)))
    tl.store(out + 9 * SIZE + at, tl.gather(a, m & (SIZE - 1), 0))


@triton.jit
def controlled(x, y, i, j, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, total, rounds = tl.load(x + at), tl.zeros((SIZE,), tl.float32), 0
    while tl.max(a, 0) > 0.05:
        a = a * 0.5
        total += tl.load(y + at + rounds, mask=at + rounds < SIZE, other=-1.0)
        rounds += 1
    for k in range(1, 4):
        if k % 2 == 1:
            total = total * 0.5 + a
        else:
            total -= k
    tl.store(out + at, total, mask=at % 3 != 1)
    tl.store(out + SIZE, rounds)


@triton.jit
def multiplied(x, y, i, j, out, SIZE: tl.constexpr):
    r, c = tl.arange(0, 16), tl.arange(0, SIZE // 16)
    a = tl.load(x + r[:, None] * (SIZE // 16) + c[None, :])
    b = tl.load(y + r[:, None] * (SIZE // 16) + c[None, :])
    product = tl.dot(a, tl.trans(b))
    tl.store(out + r[:, None] * 16 + r[None, :], product)
    tl.store(out + 256 + r, tl.sum(tl.exp(product - tl.max(product, 1)[:, None]), 1))


@triton.jit
def drawn(x, y, i, j, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.rand(7, at))
    tl.atomic_add(out + SIZE + at % 8, 1.0)
    tl.atomic_max(out + 2 * SIZE + at % 8, tl.load(x + at) + 10)


KERNELS = (arithmetic, meeting, controlled, multiplied, drawn)


def main(path: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    results = {}
    for kernel in KERNELS:
        x, y = torch.randn(2, 256, generator=generator)
        i, j = torch.randint(-(2**31), 2**31, (2, 256), generator=generator).int()
        out = torch.zeros(256 * 10)
        kernel[(1,)](x, y, i, j, out, SIZE=256)
        results[kernel.__name__] = out
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
