"""tl.dot with n along the lanes: float, double and i32 sums of any elements.

A block of the result stays in registers and gets products of a broadcast A and vectors of B added; B is packed in
panels, or, for a few rows of A, read from its own memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, Index, V, constant, vector
from moecc.codegen.x86.dot_shape import DotPlan, Rows, call, define
from moecc.codegen.x86.fma_pack import Panels, Widened, copy_pointers, pointer_bytes
from moecc.codegen.x86.pack import row_pointers, widen
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

_PAIRS = "<32 x bfloat>"
PANEL_DEPTH = 256
"""k of a panel of B: with 2 vectors of columns, half of the first cache."""


def multiply_add(b: Builder, x: V, y: V, total: V) -> V:
    """total + x * y; lanes of i32 beside sums in float are pairs of bfloats, both of whose products are added."""
    if x.lane_type == "i32" and total.lane_type == "float":
        pairs = [b.emit(f"bitcast {factor.typed} to {_PAIRS}", _PAIRS) for factor in (x, y)]
        return b.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, *pairs, overloads=())
    if total.lane_type == "i32":
        return b.op("add", total, b.op("mul", x, y))
    return b.intrinsic("llvm.fma", total.type, x, y, total)


@dataclass(frozen=True, kw_only=True)
class VectorPlan(DotPlan):
    """`vector_bytes` of a register. `pairs`: bfloats are multiplied as they are, two neighbours of k in each lane."""

    vector_bytes: int
    pairs: bool = False

    @property
    def lanes(self) -> int:
        return self.vector_bytes // BYTES[self.shape.lane]

    @property
    def sums(self) -> int:
        """Vectors of sums in registers: half of the registers, or three quarters where nothing is widened."""
        if self.pairs:
            return 24
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
            depth=math.gcd(shape.k, PANEL_DEPTH),
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
