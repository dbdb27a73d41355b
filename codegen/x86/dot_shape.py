"""What a matrix product takes: shapes, operands as rows, and the plan that the styles implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from moecc.codegen.x86.builder import Builder, Index, Module, V, constant
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

Over = Literal["outer", "k"]
"""What the rows of an operand run over: its own dimension (m or n), each row with k contiguous; or k."""


@dataclass(frozen=True)
class Rows:
    """A matrix as `count` row addresses, each of `length` contiguous elements; rows may lie anywhere.

    Only the first `used` of them need to be read, an i64; None means all.
    """

    pointers: V
    count: int
    length: int
    element: str
    used: V | None = None


@dataclass(frozen=True)
class DotShape:
    """[m, k] x [k, n] by TTIR elements. Triton's tile dimensions are powers of two; k may be that of several tiles."""

    m: int
    n: int
    k: int
    a: str
    b: str
    accumulator: str

    def __post_init__(self) -> None:
        for size in (self.m, self.n):
            if size < 1 or size & (size - 1):
                raise ValueError(
                    f"dot of {self.m}x{self.k} by {self.k}x{self.n}: m and n must be powers of two"
                )

    @property
    def sum_element(self) -> str:
        """In which sums are kept: f32 for the accumulators of 16 bits."""
        return self.accumulator if self.accumulator in ("f64", "i32") else "f32"

    @property
    def lane(self) -> str:
        """LLVM's lane of the sums."""
        return LLVM_TYPES[self.sum_element]

    @property
    def rounds(self) -> bool:
        """Sums are kept wider than the accumulator's element and rounded to it after every dot."""
        return self.accumulator != self.sum_element

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}.{self.a}.{self.b}.{self.accumulator}"


@dataclass(frozen=True, kw_only=True)
class DotPlan(ABC):
    """How one dot is computed. Buffers are aligned to 64 bytes; `a_over` and `b_over` say how the Rows run.

    `pack_a` and `pack_b` write an operand as `multiply` reads it into a buffer of `a_bytes` and `b_bytes`; the result
    may refer to the operand's own memory, and serves any number of dots of the same plan while that keeps its value.
    The accumulator is a buffer of `accumulator_bytes` in a layout of the plan's own; where `plain`, it is the
    row-major [m, n] of the accumulator's element.
    """

    shape: DotShape
    a_over: Over
    b_over: Over
    uses_tiles: bool = False

    @property
    def skips_rows(self) -> bool:
        """Whether it is worth knowing how many rows of the result have a reader."""
        return False

    @property
    @abstractmethod
    def a_bytes(self) -> int: ...

    @property
    @abstractmethod
    def b_bytes(self) -> int: ...

    @property
    def accumulator_bytes(self) -> int:
        return self.shape.m * self.shape.n * BYTES[self.shape.lane]

    @property
    def scratch_bytes(self) -> int:
        """What `emit` needs to pack both operands."""
        return self.a_bytes + self.b_bytes

    @property
    def plain(self) -> bool:
        return not self.shape.rounds

    @abstractmethod
    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None: ...

    @abstractmethod
    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None: ...

    @abstractmethod
    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        """accumulator += A @ B, not rounded."""

    def multiply(self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None) -> None:
        """accumulator += A @ B; of rows from `used` on, an i64, nothing is known afterwards."""
        self.add_product(b, packed_a, packed_b, accumulator, used)
        if self.shape.rounds:
            self._round(b, accumulator)

    def product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, rows: V, used: V | None = None
    ) -> None:
        """rows = A @ B, row-major [m, n] of the accumulator's element; the accumulator is scratch.

        Where `plain`, the two are the same buffer. Of rows from `used` on, an i64, nothing is known afterwards.
        """
        self.zero(b, accumulator)
        self.multiply(b, packed_a, packed_b, accumulator, used)
        if not self.plain:
            self.to_rows(b, accumulator, rows)

    def emit(self, b: Builder, a: Rows, b_: Rows, accumulator: V, scratch: V) -> None:
        """accumulator += A @ B, both packed into scratch of `scratch_bytes`."""
        packed_b = b.address(scratch, self.a_bytes, "i8")
        self.pack_a(b, a, scratch)
        self.pack_b(b, b_, packed_b)
        self.multiply(b, scratch, packed_b, accumulator)

    def zero(self, b: Builder, accumulator: V) -> None:
        size, zero, false = constant(self.accumulator_bytes, "i64"), constant(0, "i8"), constant(0, "i1")
        b.intrinsic("llvm.memset", "void", accumulator, zero, size, false, overloads=("ptr", "i64"))

    def to_rows(self, b: Builder, accumulator: V, rows: V) -> None:
        """The accumulator as row-major [m, n] of the accumulator's element."""
        self._convert(b, accumulator, self.shape.lane, rows, LLVM_TYPES[self.shape.accumulator])

    def from_rows(self, b: Builder, rows: V, accumulator: V) -> None:
        """Row-major [m, n] of the accumulator's element as an accumulator."""
        self._convert(b, rows, LLVM_TYPES[self.shape.accumulator], accumulator, self.shape.lane)

    def _round(self, b: Builder, accumulator: V) -> None:
        lane, element = self.shape.lane, LLVM_TYPES[self.shape.accumulator]
        size = self.accumulator_bytes // BYTES[lane]
        lanes = min(16, size)

        def body(c: Builder, index: V) -> None:
            place = c.address(accumulator_, index, lane)
            wide = c.load(f"<{lanes} x {lane}>", place)
            c.store(c.cast("fpext", c.cast("fptrunc", wide, element), lane), place)

        accumulator_ = V("%sums", "ptr")
        name = f"dot.round.{size}.{element}"
        define(b.module, name, [accumulator_], lambda c: each(c, size, lanes, body))
        call(b, name, accumulator)

    def _convert(self, b: Builder, source: V, lane: str, target: V, to: str) -> None:
        size = self.shape.m * self.shape.n
        lanes = min(16, size)
        cast = "fptrunc" if BYTES[to] < BYTES[lane] else "fpext"
        from_, into = V("%from", "ptr"), V("%to", "ptr")

        def body(c: Builder, index: V) -> None:
            value = c.load(f"<{lanes} x {lane}>", c.address(from_, index, lane))
            c.store(c.cast(cast, value, to), c.address(into, index, to))

        name = f"dot.convert.{size}.{lane}.{to}"
        define(b.module, name, [from_, into], lambda c: each(c, size, lanes, body))
        call(b, name, source, target)


def each(b: Builder, size: int, step: int, body: Callable[[Builder, V], None]) -> None:
    """body at 0, step, … below size, as a loop."""

    def once(index: V, _: list[V]) -> Sequence[V]:
        body(b, index)
        return ()

    b.loop(0, size, step, once)


def each_block(b: Builder, first: Index, last: Index, size: int, body: Callable[[Index, int], None]) -> None:
    """body(row, count) for every `size` of the rows from `first` to below `last`, then for those that are left."""
    count = _difference(b, last, first)
    whole = b.add(first, b.multiply(b.divide(count, size), size))

    def once(row: V, _: list[V]) -> Sequence[V]:
        body(row, size)
        return ()

    if whole != first:
        b.loop(first, whole, size, once)
    left = b.remainder(count, size)
    if isinstance(left, int):
        if left:
            body(whole, left)
        return
    for rows in range(1, size):
        b.choose(b.compare("icmp eq", left, constant(rows, "i64")), partial(body, whole, rows))


def _difference(b: Builder, x: Index, y: Index) -> Index:
    if isinstance(x, int) and isinstance(y, int):
        return x - y
    x, y = (i if isinstance(i, V) else constant(i, "i64") for i in (x, y))
    return x if y.name == "0" else b.op("sub", x, y)


def define(module: Module, name: str, parameters: Sequence[V], body: Callable[[Builder], None]) -> None:
    """An internal function of pointers that do not alias, once per module."""
    if name in module.functions:
        return
    b = Builder(module)
    body(b)
    b.run("ret void")
    listed = ", ".join(f"{p.type} {'noalias ' if p.type == 'ptr' else ''}{p}" for p in parameters)
    module.functions[name] = b.function(f"define internal void @{name}({listed}) noinline #0")


def call(b: Builder, name: str, *arguments: V) -> None:
    b.call(name, "void", *arguments, declare=False)
