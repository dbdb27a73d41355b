"""Atomic ops against a loop over the elements in their order, from one program and from many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Process

from moecc.codegen.x86.features import supported_levels

LEVELS = supported_levels()
INTEGERS = [torch.int32, torch.uint32, torch.int64]
FLOATS = [torch.float32, torch.float64]
SHORT = [torch.float16, torch.bfloat16]
KINDS = [
    *((kind, dtype) for kind in ("add", "max", "min", "xchg") for dtype in INTEGERS + FLOATS),
    *((kind, dtype) for kind in ("and", "or", "xor") for dtype in (torch.int32, torch.int64)),
    *(("add", dtype) for dtype in SHORT),
]
COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "max": torch.maximum,
    "min": torch.minimum,
    "xchg": lambda old, new: new,
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, min(info.max, 2**62), shape, dtype=torch.int64).to(dtype)


def apply(kind: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """In a type that has the op; unsigned numbers by their place on the number line, sums modulo their width."""
    if old.dtype == torch.uint32:
        return COMBINE[kind](old.long(), new.long()).bitwise_and(2**32 - 1).to(torch.uint32)
    return COMBINE[kind](old, new)


def in_order(kind: str, item: torch.Tensor) -> list[int]:
    """Triton finds extremes of floats by their bits: of the positive ones first, then of the negative ones."""
    places = list(range(item.numel()))
    if kind not in ("max", "min") or not item.dtype.is_floating_point:
        return places
    return sorted(places, key=lambda i: bool(torch.signbit(item[i])))


@pytest.mark.parametrize("shape", [(4,), (64,), (8, 32)])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_element_in_order(
    collective: Process, level: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Several elements change the same place; half of them are masked off."""
    x, item = numbers((6,), dtype), numbers(shape, dtype)
    target = torch.randint(0, 6, shape, dtype=torch.int32)
    mask = torch.randint(0, 2, shape, dtype=torch.int32)
    old = numbers(shape, dtype)
    got, _, old, *_ = collective(
        "modify", level, x, item, old, target, mask, S=shape, KIND=kind, MASKED=True, SEM="relaxed"
    ).tensors
    for i in in_order(kind, item.flatten()):
        at, new = target.flatten()[i], item.flatten()[i]
        if mask.flatten()[i]:
            assert torch.equal(old.flatten()[i], x[at])
            x[at] = apply(kind, x[at].clone(), new)
        else:
            assert old.flatten()[i] == 0
    assert torch.equal(got, x)


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release", "acq_rel"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_orderings_without_mask_or_result(
    collective: Process, level: str, dtype: torch.dtype, sem: str
) -> None:
    x, item = torch.zeros(32, dtype=dtype), numbers((32,), dtype)
    target = torch.randperm(32, dtype=torch.int32)
    got = collective(
        "modify", level, x, item, None, target, target, S=(32,), KIND="add", MASKED=False, SEM=sem
    ).tensors[0]
    expected = torch.zeros_like(x)
    expected[target.long()] = item
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("level", LEVELS)
def test_float_extremes_by_their_bits(collective: Process, level: str, kind: str, dtype: torch.dtype) -> None:
    """Of numbers of both signs, infinities and zeros; NaN is left out, whose place depends on its sign."""
    special = torch.tensor([0.0, float("inf"), float("-inf"), -1.5, 2.5, 1e-45, -1e-45, 3e38], dtype=dtype)
    x, item = (part.flatten().clone() for part in torch.meshgrid(special, special, indexing="ij"))
    target = torch.arange(64, dtype=torch.int32)
    got = collective(
        "modify", level, x, item, None, target, target, S=(64,), KIND=kind, MASKED=False, SEM="acq_rel"
    ).tensors[0]
    assert torch.equal(got, COMBINE[kind](x, item))


@pytest.mark.parametrize("kind", ["add", "max", "xchg"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_a_scalar(collective: Process, level: str, dtype: torch.dtype, kind: str) -> None:
    x, item, old = (numbers((1,), dtype) for _ in range(3))
    got, _, old = collective("modify_one", level, x, item, old, KIND=kind).tensors
    assert torch.equal(old, x)
    assert torch.equal(got, COMBINE[kind](x, item))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_programs_add_to_the_same_places(collective: Process, level: str, dtype: torch.dtype) -> None:
    """Sums that every type holds exactly, whatever the order."""
    programs, size = (64, 64) if dtype in (torch.int32, torch.float32) else (4, 4)
    got = collective("add_by_all", level, torch.zeros(4, dtype=dtype), grid=(programs,), N=size).tensors[0]
    parts = torch.arange(1, size + 1).reshape(-1, 4).sum(0) * programs
    assert torch.equal(got.long(), parts)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (32,), (4, 16)])
@pytest.mark.parametrize("level", LEVELS)
def test_compare_and_swap(
    collective: Process, level: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, item = torch.randint(0, 2, shape).to(dtype), numbers(shape, dtype)
    expected, old = torch.randint(0, 2, shape).to(dtype), numbers(shape, dtype)
    got, _, _, old = collective("compare_and_swap", level, x, expected, item, old, S=shape).tensors
    assert torch.equal(old, x)
    assert torch.equal(got, torch.where(x == expected, item, x))


@pytest.mark.parametrize("level", LEVELS)
def test_a_lock_that_programs_wait_for(collective: Process, level: str) -> None:
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    lock, total = collective("locked_sum", level, lock, total, grid=(20,), N=16).tensors
    assert int(lock) == 0
    assert torch.equal(total, torch.full_like(total, 20 * 19 // 2))
