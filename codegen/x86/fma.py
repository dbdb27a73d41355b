"""tl.dot on vector registers: float, double and i32 sums of any elements.

Two styles. `OuterPlan` holds a block of the result in registers and adds products of a broadcast A and vectors of B, n
along the lanes; B in panels, or, for a few rows of A, from its own memory. `InnerPlan`, for a few rows of A and B with
k contiguous, has k along the lanes: rows of B stream from their own memory, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, Index, V, constant, vector
from moecc.codegen.x86.dot_shape import DotPlan, Rows, call, define
from moecc.codegen.x86.fma_pack import Panels, Widened, copy_pointers, pointer_bytes
from moecc.codegen.x86.pack import row_pointers, widen, widen_halves
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

INNER_ROWS = 8
"""Up to as many rows of A the sums run along k."""
PANEL_DEPTH = 256
"""k of a panel of B: with 2 vectors of columns, half of the first cache."""


def multiply_add(b: Builder, x: V, y: V, total: V) -> V:
    if total.lane_type == "i32":
        return b.op("add", total, b.op("mul", x, y))
    return b.intrinsic("llvm.fma", total.type, x, y, total)


@dataclass(frozen=True, kw_only=True)
class VectorPlan(DotPlan):
    """`vector_bytes` of a register; a register's worth of accumulators is half of the registers there are."""

    vector_bytes: int

    @property
    def lanes(self) -> int:
        return self.vector_bytes // BYTES[self.shape.lane]

    @property
    def sums(self) -> int:
        """Vectors of sums in registers: half of the registers."""
        return 16 if self.vector_bytes == 64 else 8


@dataclass(frozen=True, kw_only=True)
class OuterPlan(VectorPlan):
    @property
    def columns(self) -> int:
        """Of the block of the result in registers, in vectors."""
        vectors = max(1, self.shape.n // self.lanes)
        return min(vectors, max(2, self.sums // self.shape.m))

    @property
    def rows(self) -> int:
        return min(self.shape.m, self.sums // self.columns)

    @property
    def direct(self) -> bool:
        """Whether B is read from its own memory: every element of it is used once."""
        return self.b_over == "k" and self.rows == self.shape.m

    @property
    def skips_rows(self) -> bool:
        return self.rows < self.shape.m

    @property
    def a(self) -> Widened:
        sides = (self.shape.m, self.shape.k)
        count, length = sides if self.a_over == "outer" else sides[::-1]
        return Widened(
            count=count, length=length, element=self.shape.a, lane=self.shape.lane, lanes=self.lanes
        )

    @property
    def panels(self) -> Panels:
        shape = self.shape
        return Panels(
            n=shape.n,
            k=shape.k,
            element=shape.b,
            over=self.b_over,
            lane=shape.lane,
            lanes=self.lanes,
            width=min(shape.n, self.columns * self.lanes),
            depth=min(shape.k, PANEL_DEPTH),
        )

    @property
    def a_bytes(self) -> int:
        return self.a.size_bytes

    @property
    def b_bytes(self) -> int:
        return pointer_bytes(self.shape.k) if self.direct else self.panels.size_bytes

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        self.a.pack(b, rows.pointers, packed)

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        if self.direct:
            copy_pointers(b, rows.pointers, rows.count, packed)
        else:
            self.panels.pack(b, rows.pointers, packed)

    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        parameters = [V("%a", "ptr"), V("%b", "ptr"), V("%sums", "ptr"), V("%rows", "i64")]
        name = f"fma.outer.{self.shape.name}.{self.a_over}.{self.b_over}"
        rows = constant(self.shape.m, "i64") if used is None else used
        define(b.module, name, parameters, lambda c: _outer(c, self, *parameters))
        call(b, name, packed_a, packed_b, accumulator, rows)


def _outer(b: Builder, plan: OuterPlan, a: V, b_: V, sums: V, rows: V) -> None:
    """Panels of B outermost, so that one stays in the first cache while the first rows of A pass."""
    shape, panels = plan.shape, plan.panels
    depth = shape.k if plan.direct else panels.depth

    def column_of(k: Index, column: Index) -> None:
        def block(row: V, _: list[V]) -> tuple[()]:
            _outer_block(b, plan, (a, b_, sums), (k, column, row), depth)
            return ()

        b.loop(0, rows, plan.rows, block)

    b.repeat(
        shape.k,
        depth,
        lambda k: b.repeat(shape.n, panels.width, lambda column: column_of(k, column)),
    )


def _outer_block(
    b: Builder, plan: OuterPlan, buffers: tuple[V, V, V], at: tuple[Index, Index, Index], depth: int
) -> None:
    (a, b_, sums), (first, column, row) = buffers, at
    lane, lanes = plan.shape.lane, min(plan.lanes, plan.panels.width)
    offsets = range(0, plan.panels.width, lanes)
    places = [
        b.address(sums, b.add(b.multiply(b.add(row, i), plan.shape.n), b.add(column, offset)), lane)
        for i in range(plan.rows)
        for offset in offsets
    ]
    panel = b_ if plan.direct else plan.panels.place(b, b_, first, column)

    def b_vector(k: V, offset: int) -> V:
        if not plan.direct:
            place = b.address(panel, b.add(b.multiply(k, plan.panels.width), offset), lane)
            return b.load(vector(lanes, lane), place)
        (source,) = row_pointers(b, panel, b.add(first, k), plan.shape.k, 1)
        place = b.address(source, b.add(column, offset), LLVM_TYPES[plan.shape.b])
        return widen(b, place, lanes, plan.shape.b, lane)

    def a_number(k: V, i: int) -> V:
        across, along = plan.a.stride, 1
        if plan.a_over == "k":
            across, along = along, across
        index = b.add(b.multiply(b.add(row, i), across), b.multiply(b.add(first, k), along))
        return b.splat(b.load(lane, b.address(a, index, lane)), lanes)

    def step(k: V, totals: list[V]) -> Sequence[V]:
        vectors = [b_vector(k, offset) for offset in offsets]
        numbers = [a_number(k, i) for i in range(plan.rows)]
        factors = [(x, y) for x in numbers for y in vectors]
        return [multiply_add(b, x, y, total) for (x, y), total in zip(factors, totals, strict=True)]

    started = [b.load(vector(lanes, lane), place) for place in places]
    for total, place in zip(b.loop(0, depth, 1, step, started), places, strict=True):
        b.store(total, place)


@dataclass(frozen=True, kw_only=True)
class InnerPlan(VectorPlan):
    """Both operands with k contiguous."""

    @property
    def rows(self) -> int:
        """Rows of A in one block."""
        return min(self.shape.m, 4)

    @property
    def streams(self) -> int:
        """Rows of B in one block."""
        return min(self.shape.n, self.sums // self.rows, 8)

    @property
    def halves(self) -> bool:
        """Whether bfloats are split into their even and odd elements, which costs less than to widen in order."""
        return self.shape.a == self.shape.b == "bf16" and self.shape.lane == "float" and self.shape.k > 1

    @property
    def step(self) -> int:
        """Elements of k at a time."""
        return min(self.shape.k, self.lanes * (2 if self.halves else 1))

    @property
    def a_bytes(self) -> int:
        return self.shape.m * self.shape.k * BYTES[self.shape.lane]

    @property
    def b_bytes(self) -> int:
        return pointer_bytes(self.shape.n)

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        source, target = V("%pointers", "ptr"), V("%packed", "ptr")
        name = f"fma.inner.pack.{self.shape.name}"
        define(b.module, name, [source, target], lambda c: self._pack_a(c, source, target))
        call(b, name, rows.pointers, packed)

    def _pack_a(self, b: Builder, pointers: V, packed: V) -> None:
        def row(index: Index) -> None:
            (source,) = row_pointers(b, pointers, index, self.shape.m, 1)
            start = b.multiply(index, self.shape.k)
            b.repeat(self.shape.k, self.step, lambda k: piece(source, b.add(start, k), k))

        def piece(source: V, index: Index, k: Index) -> None:
            for part, value in enumerate(self.vectors(b, source, k, self.shape.a)):
                b.store(value, b.address(packed, b.add(index, part * value.lanes), self.shape.lane))

        b.repeat(self.shape.m, 1, row)

    def vectors(self, b: Builder, row: V, k: Index, element: str) -> list[V]:
        """The step's elements of a row as lanes."""
        place = b.address(row, k, LLVM_TYPES[element])
        if self.halves:
            return widen_halves(b, place, self.step // 2)
        return [widen(b, place, self.step, element, self.shape.lane)]

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        copy_pointers(b, rows.pointers, rows.count, packed)

    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        parameters = [V("%a", "ptr"), V("%b", "ptr"), V("%sums", "ptr")]
        name = f"fma.inner.{self.shape.name}"
        define(b.module, name, parameters, lambda c: _inner(c, self, *parameters))
        call(b, name, packed_a, packed_b, accumulator)


def _inner(b: Builder, plan: InnerPlan, a: V, pointers: V, sums: V) -> None:
    def streams(column: Index) -> None:
        rows = row_pointers(b, pointers, column, plan.shape.n, plan.streams)
        b.repeat(plan.shape.m, plan.rows, lambda row: _inner_block(b, plan, a, rows, sums, (row, column)))

    b.repeat(plan.shape.n, plan.streams, streams)


def _inner_block(b: Builder, plan: InnerPlan, a: V, rows: list[V], sums: V, at: tuple[Index, Index]) -> None:
    shape, (row, column) = plan.shape, at
    parts = 2 if plan.halves else 1
    type_ = vector(plan.step // parts, shape.lane)
    a_rows = [b.address(a, b.multiply(b.add(row, i), shape.k), shape.lane) for i in range(plan.rows)]

    def step(k: V, totals: list[V]) -> Sequence[V]:
        following = list(totals)
        factors = [
            [
                b.load(type_, b.address(a_row, b.add(k, part * plan.step // parts), shape.lane))
                for part in range(parts)
            ]
            for a_row in a_rows
        ]
        for j, stream in enumerate(rows):
            values = plan.vectors(b, stream, k, shape.b)
            for i, numbers in enumerate(factors):
                for x, y in zip(numbers, values, strict=True):
                    place = i * len(rows) + j
                    following[place] = multiply_add(b, x, y, following[place])
        return following

    zeros = [constant(0, shape.lane, plan.step // parts)] * (len(rows) * plan.rows)
    totals = b.loop(0, shape.k, plan.step, step, zeros)
    for i in range(plan.rows):
        place = b.address(sums, b.add(b.multiply(b.add(row, i), shape.n), column), shape.lane)
        _add_sums(b, totals[i * len(rows) : (i + 1) * len(rows)], place)


def _add_sums(b: Builder, totals: list[V], place: V) -> None:
    """Add the sum of each vector's lanes to a number in memory."""
    line = b.load(vector(len(totals), totals[0].lane_type), place)
    found = V("poison", line.type)
    for index, total in enumerate(totals):
        found = b.insert(found, _sum_of_lanes(b, total), index)
    b.store(b.op(_addition(line.lane_type), line, found), place)


def _addition(lane: str) -> str:
    return "add" if lane == "i32" else "fadd"


def _sum_of_lanes(b: Builder, value: V) -> V:
    while value.lanes > 1:
        half = value.lanes // 2
        low, high = (b.shuffle(value, value, range(first, first + half)) for first in (0, half))
        value = b.op(_addition(value.lane_type), low, high)
    return b.extract(value, 0)
