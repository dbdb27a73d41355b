"""Where the value of a tile is, and the state of lowering one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moecc.codegen.x86.builder import Builder, Index, V
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import Level
from moecc.codegen.x86.lanes import LaneValue, Window, row_major
from moecc.codegen.x86.tree import Op, Value
from moecc.codegen.x86.types import BYTES, Type

if TYPE_CHECKING:
    from moecc.codegen.x86.dot_shape import DotPlan
    from moecc.codegen.x86.plan import Plan


@dataclass(frozen=True)
class Stored:
    """In memory, row-major; truth values as bytes."""

    buffer: V
    type: Type

    @property
    def strides(self) -> list[int]:
        return row_major(self.type.dims)


@dataclass(frozen=True)
class Inline:
    """Evaluated where it is used."""

    op: Op


@dataclass(frozen=True)
class Shifted:
    """`initial` plus one scalar for all elements, which a loop carries; pointers by elements."""

    initial: Value
    offset: V


@dataclass(frozen=True)
class Accumulating:
    """In the layout of the dot that adds to it, until a loop ends."""

    buffer: V
    dot: DotPlan


Tile = Stored | Inline | Shifted | Accumulating
InlineRule = Callable[["Frame", Op, Window, Value], LaneValue]
Rule = Callable[["Frame", Op], None]

STACK_BYTES = 16 * 1024
"""A larger tile lives in the arena of its thread, where LLVM need not grow the stack frame for it."""


@dataclass
class Arena:
    """Offsets of the large tiles of a kernel in the memory that every thread has."""

    bytes: int = 0

    def take(self, count: int) -> int:
        start = self.bytes
        self.bytes += -(-count // 64) * 64
        return start


@dataclass
class Frame:
    """Lowering of one function: `scalars` and `tiles` say where each value is.

    `inline` and `rules` are the tables of ops: those that are evaluated at a window, and those that run in order.
    """

    b: Builder
    level: Level
    plan: Plan
    inline: Mapping[str, InlineRule]
    rules: Mapping[str, Rule]
    arena: Arena | None
    scalars: dict[Value, V] = field(default_factory=dict)
    tiles: dict[Value, Tile] = field(default_factory=dict)
    memo: dict[tuple[Value, Window], LaneValue] = field(default_factory=dict)
    packed: dict[object, V | None] = field(default_factory=dict)
    results: list[V] = field(default_factory=list)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Code that may run never or many times: what it evaluated is not known outside."""
        memo, packed = self.memo, self.packed
        self.memo, self.packed = {}, {}
        yield
        self.memo, self.packed = memo, packed

    def allocate(self, lane_type: str, count: int) -> V:
        size = BYTES[lane_type] * count
        if self.arena is None or size <= STACK_BYTES:
            return self.b.allocate(lane_type, count)
        name = self.b.fresh()
        self.b.entry.append(f"  {name} = getelementptr i8, ptr %arena, i64 {self.arena.take(size)}")
        return V(name, "ptr")

    def new_tile(self, type_: Type) -> Stored:
        return Stored(self.allocate(type_.llvm, type_.size), type_)

    def run(self, op: Op) -> None:
        """Lower an op that is not inline."""
        if op.name not in self.rules:
            raise UnsupportedError(f"op {op.name}").at(op.location)
        try:
            self.rules[op.name](self, op)
        except UnsupportedError as error:
            raise error.at(op.location) from None


def indices(b: Builder, window: Window, strides: list[int]) -> Index:
    """Offset in elements of the window's first element."""
    return b.dot_index(window.base, strides)
