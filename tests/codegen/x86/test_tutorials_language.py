# mypy: ignore-errors
"""What the language has beside arithmetic: control flow, calls, tuples, and ops that move elements about."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels
from moecc.codegen.x86.float_formats import bits_of_small

sys.path.append(str(Path(__file__).parent))
from guarded import Guarded, assert_close

pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with activated(request.param):
        yield


@triton.jit
def collatz(x_ptr, steps_ptr, path_ptr, SIZE: tl.constexpr):
    """A while loop that carries tiles of two types and a scalar."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    steps = tl.zeros((SIZE,), tl.int32)
    highest = x.to(tl.float32)
    rounds = 0
    while tl.max(x, axis=0) > 1:
        odd = (x & 1) == 1
        running = x > 1
        x = tl.where(running, tl.where(odd, 3 * x + 1, x >> 1), x)
        steps += running.to(tl.int32)
        highest = tl.maximum(highest, x.to(tl.float32))
        rounds += 1
    tl.store(steps_ptr + at, steps)
    tl.store(steps_ptr + SIZE, rounds)
    tl.store(path_ptr + at, highest)


def test_a_while_loop_carries_tiles() -> None:
    x = torch.arange(1, 65, dtype=torch.int32)
    steps, highest = Guarded(65, dtype=torch.int32), Guarded(64)
    collatz[(1,)](x, steps.tensor, highest.tensor, SIZE=64)
    expected = []
    for number in x.tolist():
        path = [number]
        while path[-1] > 1:
            path.append(3 * path[-1] + 1 if path[-1] % 2 else path[-1] // 2)
        expected.append((len(path) - 1, max(path)))
    counts = [count for count, _ in expected]
    assert steps.result().tolist() == [*counts, max(counts)]
    assert highest.result().tolist() == [float(top) for _, top in expected]


@triton.jit
def leave_early(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    pid = tl.program_id(0)
    if pid * SIZE >= n:
        return
    at = pid * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, at < n, other=0.0)
    if tl.sum(x, 0) < 0:
        tl.store(out_ptr + at, -x, at < n)
        return
    tl.store(out_ptr + at, x, at < n)


def test_an_early_return() -> None:
    x, out = torch.randn(100), Guarded(100)
    leave_early[(9,)](x, out.tensor, 100, SIZE=16)
    expected = torch.cat([block * (-1 if block.sum() < 0 else 1) for block in x.split(16)])
    assert torch.equal(out.result(), expected)


@triton.jit(noinline=True)
def moments(x_ptr, factor, SIZE: tl.constexpr):
    """Tiles cannot be handed to a function that is not inlined, but it can return them."""
    x = tl.load(x_ptr + tl.arange(0, SIZE)) * factor
    mean = tl.sum(x, 0) / SIZE
    centred = x - mean
    return centred, tl.sum(centred * centred, 0) / SIZE


@triton.jit(noinline=True)
def outer_product(x_ptr, y_ptr, factor, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    product = tl.load(x_ptr + at)[:, None] * tl.load(y_ptr + at)[None, :]
    if factor > 0:
        return product * factor
    else:
        return tl.trans(product)


@triton.jit
def call_functions(x_ptr, y_ptr, out_ptr, variance_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    centred, variance = moments(x_ptr, 1.0, SIZE)
    twice, second = moments(x_ptr, 2.0, SIZE)
    tl.store(variance_ptr, variance)
    tl.store(variance_ptr + 1, second)
    before = outer_product(x_ptr, y_ptr, 3.0, SIZE)
    tl.store(y_ptr + at, twice - centred)
    after = outer_product(x_ptr, y_ptr, -1.0, SIZE)
    tl.store(out_ptr + at[:, None] * SIZE + at[None, :], before + after)


def test_functions_that_are_not_inlined() -> None:
    x, y = torch.randn(2, 64)
    out, variance = Guarded(64, 64), Guarded(2)
    expected = 3 * torch.outer(x, y).double()
    call_functions[(1,)](x, y, out.tensor, variance.tensor, SIZE=64)
    centred = x.double() - x.double().mean()
    assert_close(y, centred, 1e-5)
    assert_close(out.result(), expected + torch.outer(centred, x.double()), 1e-5)
    spread = centred.var(correction=0)
    assert_close(variance.result(), torch.stack([spread, 4 * spread]), 1e-5)


@triton.jit
def weigh(pair, factors: tl.constexpr):
    return pair[0] * factors[0], pair[1] * factors[1]


@triton.jit
def use_tuples(pointers, sizes, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(pointers[0] + at, at < sizes[0], 0.0), tl.load(pointers[1] + at, at < sizes[1], 0.0)
    for i in tl.static_range(3):
        a, b = weigh((b, a), (i + 1, 2))
    tl.store(pointers[2] + at, a)
    tl.store(pointers[2] + SIZE + at, b)


def test_tuples_and_static_ranges() -> None:
    a, b = torch.randn(2, 32)
    out = Guarded(64)
    use_tuples[(1,)]((a, b, out.tensor), (20, 7), SIZE=32)
    a[20:], b[7:] = 0, 0
    for i in range(3):
        a, b = b * (i + 1), a * 2
    assert torch.equal(out.result(), torch.cat([a, b]))


@triton.jit
def nest_loops(x_ptr, out_ptr, row_ptr, outer, inner, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    columns, total, counts = tl.zeros((N,), tl.float32), 0.0, tl.zeros((M, 1), tl.int32)
    for i in range(outer):
        rows = tl.zeros((M,), tl.float32)
        for j in range(i, inner):
            rows += tl.sum(x, 1) * (j + 1)
            x = x * 0.5 + columns[None, :]
            if j % 2 == 1:
                x = tl.flip(x, 1)
                counts += (x > 0).to(tl.int32).sum(1, keep_dims=True)
        columns += tl.sum(x * rows[:, None], 0) * 0.01
        total += tl.sum(rows, 0)
    tl.store(out_ptr + m[:, None] * N + n[None, :], x + counts)
    tl.store(row_ptr + n, columns)
    tl.store(row_ptr + N, total)


@pytest.mark.parametrize(("outer", "inner"), [(0, 3), (1, 0), (3, 4), (5, 3)])
def test_nested_loops_carry_tiles_of_several_shapes(outer: int, inner: int) -> None:
    x = torch.randn(8, 32)
    out, row = Guarded(8, 32), Guarded(33)
    nest_loops[(1,)](x, out.tensor, row.tensor, outer, inner, M=8, N=32)
    x, columns, total = x.double(), torch.zeros(32).double(), torch.zeros(()).double()
    counts = torch.zeros(8, 1).double()
    for i in range(outer):
        rows = torch.zeros(8).double()
        for j in range(i, inner):
            rows += x.sum(1) * (j + 1)
            x = x * 0.5 + columns
            if j % 2 == 1:
                x = x.flip(1)
                counts += (x > 0).sum(1, keepdim=True)
        columns = columns + (x * rows[:, None]).sum(0) * 0.01
        total += rows.sum()
    assert_close(out.result(), x + counts, 1e-4)
    assert_close(row.result(), torch.cat([columns, total[None]]), 1e-4)


@triton.jit
def turn_while_shifting(x_ptr, out_ptr, outer, inner, SIZE: tl.constexpr):
    """What a loop shifts is the transpose of what the loop around it carries."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    for _ in range(outer):
        turned = tl.trans(x)
        for _ in range(inner):
            turned += 3
        x = turned
    tl.store(out_ptr + at, x)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 2), (2, 0)])
def test_a_shifted_transpose_of_what_is_carried(outer: int, inner: int) -> None:
    x = torch.randint(-99, 99, (32, 32), dtype=torch.int32)
    out = Guarded(32, 32, dtype=torch.int32)
    turn_while_shifting[(1,)](x, out.tensor, outer, inner, SIZE=32)
    assert torch.equal(out.result(), (x.T if outer % 2 else x) + 3 * outer * inner)


@triton.jit
def move_elements(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    both = tl.arange(0, 2 * SIZE)
    tl.store(out_ptr + both, tl.interleave(x, y))
    tl.store(out_ptr + 2 * SIZE + both, tl.cat(x, y, can_reorder=True).sum() + both)
    low, high = tl.split(tl.reshape(tl.join(x, y), (SIZE, 2)))
    tl.store(out_ptr + 4 * SIZE + at, low - high)
    cube = tl.permute(tl.reshape(x, (4, SIZE // 8, 2)), (2, 0, 1))
    tl.store(out_ptr + 5 * SIZE + at, tl.ravel(cube))
    tl.store(out_ptr + 6 * SIZE + at, tl.flip(tl.cumsum(y, 0), 0))
    tl.store(out_ptr + 7 * SIZE + at, tl.sort(x, descending=True))


@pytest.mark.parametrize("size", [8, 16, 128])
def test_elements_are_moved(size: int) -> None:
    x, y = torch.randint(-999, 999, (2, size), dtype=torch.int32)
    out = Guarded(8 * size, dtype=torch.int32)
    move_elements[(1,)](x, y, out.tensor, SIZE=size)
    expected = [
        torch.stack([x, y], 1).flatten(),
        torch.arange(2 * size) + x.sum() + y.sum(),
        x - y,
        x.reshape(4, size // 8, 2).permute(2, 0, 1).flatten(),
        y.cumsum(0).flip(0),
        x.sort(descending=True)[0],
    ]
    assert torch.equal(out.result(), torch.cat(expected).int())


@triton.jit
def batched_dot(a_ptr, b_ptr, c_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, m, n, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None, None] * M * K + m[None, :, None] * K + k[None, None, :])
    b = tl.load(b_ptr + i[:, None, None] * K * N + k[None, :, None] * N + n[None, None, :])
    c = tl.dot(a, b, out_dtype=tl.float32)
    tl.store(c_ptr + i[:, None, None] * M * N + m[None, :, None] * N + n[None, None, :], c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dots_of_three_dimensions(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 16, 32).to(dtype), torch.randn(4, 32, 64).to(dtype)
    out = Guarded(4, 16, 64)
    batched_dot[(1,)](a, b, out.tensor, B=4, M=16, N=64, K=32)
    assert_close(out.result(), a.double() @ b.double(), 2e-6)


@triton.jit
def wrap_integers(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x * y + 0x7FFFFFFF)
    tl.store(out_ptr + SIZE + at, (x.to(tl.uint32) >> 3).to(tl.int32, bitcast=True) ^ (x << 5))
    tl.store(out_ptr + 2 * SIZE + at, tl.umulhi(x.to(tl.uint32), y.to(tl.uint32)).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * SIZE + at, x // (y | 1) + x % (y | 1))
    tl.store(out_ptr + 4 * SIZE + at, (x.to(tl.int8) + y.to(tl.int8)).to(tl.int32))


def test_integers_wrap() -> None:
    random = np.random.default_rng(3)
    x, y = random.integers(-(2**31), 2**31, (2, 256)).astype(np.int32)
    out = Guarded(5 * 256, dtype=torch.int32)
    wrap_integers[(1,)](torch.from_numpy(x), torch.from_numpy(y), out.tensor, SIZE=256)
    a, b = x.astype(np.uint32), y.astype(np.uint32)
    divisor = (y | 1).astype(np.int64)
    quotient = np.trunc(x / divisor).astype(np.int64)
    with np.errstate(over="ignore"):
        expected = [
            (a * b + np.uint32(0x7FFFFFFF)).astype(np.int32),
            ((a >> np.uint32(3)) ^ (a << np.uint32(5))).astype(np.int32),
            ((a.astype(np.uint64) * b) >> np.uint64(32)).astype(np.uint32).astype(np.int32),
            (quotient + (x - quotient * divisor)).astype(np.int32),
            (x.astype(np.int8) + y.astype(np.int8)).astype(np.int32),
        ]
    assert out.result().tolist() == np.concatenate(expected).tolist()


@triton.jit
def widen(x_ptr, out_ptr, n, other, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, at < n, other=other).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("other", [0.0, 1.5])
def test_small_floats_are_loaded(dtype: torch.dtype, other: float) -> None:
    bits = torch.arange(256).to(torch.uint8)
    out = Guarded(256)
    widen[(1,)](bits.view(dtype), out.tensor, 250, other, SIZE=256)
    expected = bits.view(dtype).float()
    expected[250:] = other
    assert torch.equal(out.result().nan_to_num(9e9), expected.nan_to_num(9e9))


@triton.jit
def masked_with_constants(x_ptr, out_ptr, n, OTHER: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, at < n, other=OTHER)
    tl.store(out_ptr + at, x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("other", [0.0, 1.5, -0.001953125, 448.0, float("nan")])
def test_constants_of_small_floats(dtype: torch.dtype, other: float) -> None:
    x, out = torch.randn(64).to(dtype), Guarded(64, dtype=torch.uint8)
    masked_with_constants[(1,)](x, out.tensor.view(dtype), 50, OTHER=other, SIZE=64)
    expected = torch.cat([x[:50], torch.full((14,), other).to(dtype)])
    found = out.result().view(dtype).float()
    assert torch.equal(found.nan_to_num(9e9), expected.float().nan_to_num(9e9))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_bits_of_every_small_float(dtype: torch.dtype) -> None:
    element = {torch.float8_e4m3fn: "f8E4M3FN", torch.float8_e5m2: "f8E5M2"}[dtype]
    numbers = torch.arange(256).to(torch.uint8).view(dtype).double().tolist()
    finite = [bits for bits, number in enumerate(numbers) if np.isfinite(number)]
    assert [bits_of_small(numbers[bits], element) for bits in finite] == finite
