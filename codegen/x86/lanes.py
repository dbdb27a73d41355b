"""A block of elements of a tile, and what is known of their values: one for all, evenly spaced, or a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

from moecc.codegen.x86.builder import Builder, Index, V, constant, constants, vector

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """`extent[d]` elements from `base[d]` on along every dimension d of a tile; lanes are in row-major order.

    Extents are powers of two and divide the base.
    """

    base: tuple[Index, ...]
    extent: tuple[int, ...]

    @property
    def lanes(self) -> int:
        return prod(self.extent)

    def replace(self, dim: int, base: Index, extent: int) -> Window:
        return Window(_with(self.base, dim, base), _with(self.extent, dim, extent))

    def drop(self, dim: int) -> Window:
        return Window(self.base[:dim] + self.base[dim + 1 :], self.extent[:dim] + self.extent[dim + 1 :])

    def insert(self, dim: int, base: Index = 0, extent: int = 1) -> Window:
        return Window(
            (*self.base[:dim], base, *self.base[dim:]), (*self.extent[:dim], extent, *self.extent[dim:])
        )

    def offsets(self, strides: Sequence[int]) -> list[int]:
        """Of every lane from the first one, in elements of memory with these strides."""
        offsets = [0]
        for extent, stride in zip(self.extent, strides, strict=True):
            offsets = [offset + i * stride for offset in offsets for i in range(extent)]
        return offsets


def _with(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


@dataclass(frozen=True)
class Uniform:
    """The same scalar in every lane."""

    value: V


@dataclass(frozen=True)
class Ramp:
    """Lane i holds base + i * step: of integers modulo their width, of pointers in elements of `pointee`.

    `guards` are conditions under which that is so, `exact` gives the lanes where they do not hold: an extended i32
    is evenly spaced only while it does not wrap.
    """

    base: V
    step: int
    pointee: str = ""
    guards: tuple[V, ...] = ()
    exact: Callable[[], V] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Lanes:
    """A vector."""

    value: V


LaneValue = Uniform | Ramp | Lanes


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides in elements."""
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def as_vector(b: Builder, value: LaneValue, lanes: int) -> V:
    """The value with that many lanes; the scalar of a block of one."""
    if isinstance(value, Lanes):
        return value.value
    if isinstance(value, Uniform):
        return b.splat(value.value, lanes if lanes > 1 else 0)
    if lanes == 1:
        return value.base
    if value.exact is not None:
        return value.exact()
    return spread(b, value, lanes)


def spread(b: Builder, ramp: Ramp, lanes: int) -> V:
    """base + i * step, whatever the guards say."""
    if ramp.base.type == "ptr":
        offsets = constants([lane * ramp.step for lane in range(lanes)], "i64")
        return b.emit(
            f"getelementptr {ramp.pointee}, {ramp.base.typed}, {offsets.typed}", vector(lanes, "ptr")
        )
    steps = constants([lane * ramp.step for lane in range(lanes)], ramp.base.type)
    return b.op("add", b.splat(ramp.base, lanes), steps)


def all_hold(b: Builder, guards: Sequence[V]) -> V:
    """True where there is none."""
    total = constant(True, "i1")
    for guard in dict.fromkeys(guards):
        total = guard if total.name == "1" else b.op("and", total, guard)
    return total


def permute(b: Builder, value: LaneValue, picks: Sequence[int]) -> LaneValue:
    """Lanes by number."""
    if isinstance(value, Uniform):
        return value
    if list(picks) == list(range(len(picks))) and not isinstance(value, Ramp):
        return value
    source = as_vector(b, value, max(picks) + 1 if isinstance(value, Ramp) else 0)
    return Lanes(b.shuffle(source, source, picks))
