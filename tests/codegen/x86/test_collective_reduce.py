"""Reductions and scans along every axis of tiles of every rank, at every level, against NumPy and brute force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from compiled import Process

from moecc.codegen.x86.features import supported_levels

LEVELS = supported_levels()
SHAPES = [(1,), (2,), (64,), (1024,), (4, 8), (8, 4), (2, 128), (64, 2), (1, 32), (32, 1), (16, 64)]
DEEP = [(4, 2, 8), (2, 16, 32), (8, 8, 1), (2, 4, 2, 4), (4, 2, 16, 2), (2, 2, 2, 64), (2, 2, 2, 2, 2, 2, 2)]
CASES = [(shape, axis) for shape in SHAPES + DEEP for axis in range(len(shape))]


def by_level(cases: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Every case at one level, and the levels in turn."""
    return [(LEVELS[i % len(LEVELS)], *case) for i, case in enumerate(cases)]


def integers(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype)


def without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def compose(tile: torch.Tensor, axis: int, reverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """All partial compositions of x -> tile x + (tile + 1), modulo 2^32, in order along the axis."""
    items = np.moveaxis(tile.numpy().astype(np.uint32), axis, 0)[..., None]
    items = items[::-1] if reverse else items
    factors, terms = [items[0]], [items[0] + np.uint32(1)]
    for item in items[1:]:
        factors.append(factors[-1] * item)
        terms.append(terms[-1] * item + item + np.uint32(1))
    both = [np.stack(part[::-1] if reverse else part) for part in (factors, terms)]
    a, b = (np.moveaxis(part[..., 0], 0, axis).astype(np.uint32).view(np.int32) for part in both)
    return a, b


@pytest.mark.parametrize(("level", "shape", "axis"), by_level(CASES))
def test_the_order_of_what_is_reduced(
    collective: Process, level: str, shape: tuple[int, ...], axis: int
) -> None:
    x = integers(shape)
    y, z = integers(without(shape, axis)), integers(without(shape, axis))
    _, y, z = collective("reduce", level, x, y, z, S=shape, AXIS=axis, WHAT="affine").tensors
    a, b = compose(x, axis)
    assert torch.equal(y, torch.as_tensor(a.take(-1, axis)))
    assert torch.equal(z, torch.as_tensor(b.take(-1, axis)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("level", "shape", "axis"), by_level(CASES))
def test_the_order_of_a_scan(
    collective: Process, level: str, shape: tuple[int, ...], axis: int, reverse: bool
) -> None:
    x, y, z = (integers(shape) for _ in range(3))
    options: dict[str, Any] = {"S": shape, "AXIS": axis, "WHAT": "affine", "REVERSE": reverse}
    _, y, z = collective("scan", level, x, y, z, **options).tensors
    a, b = compose(x, axis, reverse)
    assert torch.equal(y, torch.from_numpy(a.copy()))
    assert torch.equal(z, torch.from_numpy(b.copy()))


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


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else integers(shape, dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_sum_and_scan_of_every_type(collective: Process, level: str, dtype: torch.dtype, axis: int) -> None:
    """Integers narrower than 32 bits are added up in 32, as Triton promotes them; floats in their own type."""
    shape = (16, 64)
    x = numbers(shape, dtype)
    wide = dtype if x.element_size() >= 4 or dtype.is_floating_point else torch.int32
    total = numbers(without(shape, axis), wide)
    total = collective("reduce", level, x, total, total, S=shape, AXIS=axis, WHAT="sum").tensors[1]
    part = numbers(shape, wide)
    options: dict[str, Any] = {"S": shape, "AXIS": axis, "WHAT": "sum", "REVERSE": False}
    part = collective("scan", level, x, part, part, **options).tensors[1]
    if x.is_floating_point():
        exact = x.double()
        room = 0.5 * shape[axis] * torch.finfo(dtype).eps * exact.abs().sum(axis, keepdim=True)
        assert ((total.double() - exact.sum(axis)).abs() <= room.squeeze(axis)).all()
        assert ((part.double() - exact.cumsum(axis)).abs() <= room).all()
    else:
        assert torch.equal(total, x.to(wide).sum(axis, dtype=wide))
        assert torch.equal(part, x.to(wide).cumsum(axis, dtype=wide))


@pytest.mark.parametrize(("shape", "axis"), [((128,), 0), ((8, 32), 0), ((8, 32), 1), ((4, 4, 4), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8])
@pytest.mark.parametrize("level", LEVELS)
def test_argmax_takes_the_first_of_equals(
    collective: Process, level: str, dtype: torch.dtype, shape: tuple[int, ...], axis: int
) -> None:
    x = torch.randint(-5, 5, shape).to(dtype)
    wide = dtype if x.element_size() >= 4 else torch.float32 if dtype.is_floating_point else torch.int32
    value = torch.full(without(shape, axis), 99, dtype=wide)
    index = torch.full(without(shape, axis), -1, dtype=torch.int32)
    options: dict[str, Any] = {"S": shape, "AXIS": axis, "WHAT": "argmax"}
    _, value, index = collective("reduce", level, x, value, index, **options).tensors
    expected = torch.as_tensor(x.double().numpy().argmax(axis))
    assert torch.equal(index.long(), expected)
    assert torch.equal(value.double(), x.double().amax(axis))


@pytest.mark.parametrize(("level", "shape", "axis"), by_level([((1024,), 0), ((8, 64), 1), ((64, 8), 0)]))
def test_welford(collective: Process, level: str, shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape) + 3
    mean, variance = (torch.full(without(shape, axis), float("nan")) for _ in range(2))
    options: dict[str, Any] = {"S": shape, "AXIS": axis, "WHAT": "welford"}
    _, mean, variance = collective("reduce", level, x, mean, variance, **options).tensors
    torch.testing.assert_close(mean.double(), x.double().mean(axis))
    torch.testing.assert_close(variance.double(), x.double().var(axis, correction=0))


@pytest.mark.parametrize("level", LEVELS)
def test_a_maximum_ignores_nan(collective: Process, level: str) -> None:
    x = torch.randn(8, 64)
    x[torch.rand(8, 64) < 0.3] = float("nan")
    x[3] = float("nan")
    y = torch.zeros(8)
    y = collective("reduce", level, x, y, y, S=(8, 64), AXIS=1, WHAT="max").tensors[1]
    assert torch.equal(y.isnan(), torch.arange(8) == 3)
    kept = x.nan_to_num(float("-inf")).amax(1)
    assert torch.equal(y[~y.isnan()], kept[~y.isnan()])


@pytest.mark.parametrize("what", ["xor", "left"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("level", LEVELS)
def test_combiners_that_keep_bits(collective: Process, level: str, axis: int, what: str) -> None:
    shape = (8, 4, 16)
    x, y = integers(shape), integers(without(shape, axis))
    y = collective("reduce", level, x, y, y, S=shape, AXIS=axis, WHAT=what).tensors[1]
    expected = x.numpy().take(0, axis) if what == "left" else np.bitwise_xor.reduce(x.numpy(), axis)
    assert torch.equal(y, torch.as_tensor(expected.copy()))
