"""Elements that change places: sort, top k, flip, gather, concatenation; counts, and scalar functions of elements."""

from __future__ import annotations

import pytest
import torch
from compiled import Process

from moecc.codegen.x86.features import supported_levels

LEVELS = supported_levels()
DTYPES = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
SHAPES = [(1,), (2,), (8,), (16,), (32,), (256,), (1024,), (4, 16), (16, 4), (2, 128), (128, 2), (4, 2, 8)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", LEVELS)
def test_sort(collective: Process, level: str, shape: tuple[int, ...], descending: bool) -> None:
    x = numbers(shape, torch.float32)
    y = poisoned(shape, x.dtype)
    y = collective("sort", level, x, y, S=shape, DESCENDING=descending).tensors[1]
    assert torch.equal(y, x.sort(-1, descending=descending).values)


@pytest.mark.parametrize("shape", [(64,), (4, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_sort_of_every_type(
    collective: Process, level: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = numbers(shape, dtype)
    y = collective("sort", level, x, poisoned(shape, dtype), S=shape, DESCENDING=False).tensors[1]
    assert torch.equal(y, x.sort(-1).values)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [8, 64])
def test_sort_of_specials_is_the_bitonic_network(collective: Process, size: int, descending: bool) -> None:
    """A comparison with NaN is false: the right one of a pair then takes the left one's value, as of equal zeros."""
    x = torch.randn(size)
    for special in (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-45):
        x[torch.rand(size) < 0.1] = special
    results = []
    for level in LEVELS:
        y = poisoned((size,), x.dtype)
        results.append(collective("sort", level, x, y, S=(size,), DESCENDING=descending).tensors[1])
    expected = bitonic(x, descending)
    for y in results:
        assert torch.equal(y.view(torch.int32), expected.view(torch.int32))


def bitonic(x: torch.Tensor, descending: bool) -> torch.Tensor:
    """Triton's network, one compare-and-swap after the other."""
    count = x.numel().bit_length() - 1
    at = torch.arange(x.numel())
    for stage in range(1, count + 1):
        flip = at >> stage & 1 if stage < count else torch.full_like(at, int(descending))
        for bit in reversed(range(stage)):
            other = x[at ^ (1 << bit)]
            swaps = (x > other) != (flip ^ (at >> bit & 1)).bool()
            x = torch.where(swaps, other, x)
    return x


@pytest.mark.parametrize(
    ("shape", "k"), [((16,), 2), ((64,), 8), ((256,), 4), ((256,), 128), ((8, 128), 8), ((64, 32), 4)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_topk(collective: Process, level: str, shape: tuple[int, ...], k: int) -> None:
    x = numbers(shape, torch.float32)
    y = poisoned((*shape[:-1], k), x.dtype)
    y = collective("topk", level, x, y, S=shape, K=k).tensors[1]
    assert torch.equal(y, x.topk(k).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize(
    ("shape", "axis"), [((4,), 0), ((256,), 0), ((8, 64), 0), ((8, 64), 1), ((64, 4), 0), ((4, 8, 2), 1)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_flip(collective: Process, level: str, shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    y = collective("flip", level, x, poisoned(shape, dtype), S=shape, AXIS=axis).tensors[1]
    assert torch.equal(y, x.flip(axis))


@pytest.mark.parametrize("level", LEVELS)
def test_sorted_tiles_seen_through_other_windows(collective: Process, level: str) -> None:
    """Of each row and the row plus one, sorted along the short dimension, the weighted sum."""
    x = numbers((5, 64), torch.float32)
    y = collective("sort_rows_in_loop", level, x, poisoned((64,), x.dtype), 5, N=64).tensors[1]
    expected = torch.zeros(64, dtype=torch.float64)
    for row in x.double():
        pair = torch.stack([row, row + 1])
        expected += (pair.sort(-1).values * torch.tensor([[1.0], [2.0]])).sum(0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize(
    ("shape", "to", "axis"),
    [
        ((64,), (64,), 0),
        ((4,), (256,), 0),
        ((256,), (2,), 0),
        ((8, 32), (8, 64), 1),
        ((8, 32), (16, 32), 0),
        ((2, 8, 4), (2, 16, 4), 1),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_gather(
    collective: Process,
    level: str,
    shape: tuple[int, ...],
    to: tuple[int, ...],
    axis: int,
    dtype: torch.dtype,
) -> None:
    x, index = numbers(shape, dtype), torch.randint(0, shape[axis], to, dtype=torch.int32)
    y = collective("gather", level, x, index, poisoned(to, dtype), S=shape, TO=to, AXIS=axis).tensors[2]
    assert torch.equal(y, x.gather(axis, index.long()))


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_concatenation(collective: Process, level: str, size: int) -> None:
    x, y = numbers((size,), torch.float32), numbers((size,), torch.float32)
    out = collective("concatenate", level, x, y, poisoned((2 * size,), x.dtype), N=size).tensors[2]
    assert torch.equal(out, torch.cat([x + 1, y]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize(("size", "bins"), [(8, 2), (64, 16), (1024, 64), (256, 1)])
@pytest.mark.parametrize("level", LEVELS)
def test_histogram(
    collective: Process, level: str, size: int, bins: int, dtype: torch.dtype, masked: bool
) -> None:
    """Numbers below zero or beyond the bins are not counted."""
    x = torch.randint(-2, bins + 2, (size,), dtype=dtype)
    counts = torch.full((bins,), 99, dtype=torch.int32)
    counts = collective("histogram", level, x, counts, size // 2, N=size, BINS=bins, MASKED=masked).tensors[1]
    counted = x[: size // 2] if masked else x
    counted = counted[(counted >= 0) & (counted < bins)]
    assert torch.equal(counts.long(), torch.bincount(counted.long(), minlength=bins))


@pytest.mark.parametrize("shape", [(1,), (64,), (4, 8)])
@pytest.mark.parametrize("level", LEVELS)
def test_scalar_functions_with_branches_and_loops(
    collective: Process, level: str, shape: tuple[int, ...]
) -> None:
    x, y = torch.randint(-3, 40, shape, dtype=torch.int32), torch.randint(0, 9, shape, dtype=torch.int32)
    _, first, steps = collective("map_elements", level, x, y, torch.full_like(x, 99), S=shape).tensors

    def collatz(a: int, b: int) -> tuple[int, int]:
        if a <= 0:
            return b, -1
        count = 0
        while a > 1:
            a, count = a // 2 if a % 2 == 0 else 3 * a + 1, count + 1
        return a + b, count

    pairs = [collatz(int(a), int(b)) for a, b in zip(x.flatten(), y.flatten(), strict=True)]
    assert first.flatten().tolist() == [a for a, _ in pairs]
    assert steps.flatten().tolist() == [b for _, b in pairs]


@pytest.mark.parametrize("level", LEVELS)
def test_scalar_functions_of_neighbours(collective: Process, level: str) -> None:
    x = numbers((8, 16), torch.float32)
    y = collective("map_pairs", level, x, poisoned((8, 16), x.dtype), S=(8, 16)).tensors[1]
    assert torch.equal(y, x.reshape(-1, 2).sort(-1).values.reshape(8, 16))
