"""tl.dot of bfloats in pairs, with n along the lanes: for a B whose rows run along n.

Two neighbours of k share a lane, so two rows of B are interleaved: a panel of columns at a time, which stays in the
first cache while the rows of A pass it. A is broadcast, a pair at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from moecc.codegen.x86.builder import Builder, Index, V, constant, vector
from moecc.codegen.x86.dot_shape import Rows, call, define, each_block
from moecc.codegen.x86.fma import PANEL_DEPTH, VectorPlan, multiply_add
from moecc.codegen.x86.fma_pack import PADDING, copy_pointers, pointer_bytes
from moecc.codegen.x86.pack import row_pointers
from moecc.codegen.x86.types import BYTES

PANEL_VECTORS = 4
ROWS_BY_FULL_PANEL, ROWS_BY_NARROW_PANEL = 6, 8
"""Rows of A in one block: 24 sums by the four vectors of a full panel, at most 16 by two or one."""


@dataclass(frozen=True, kw_only=True)
class OuterPairsPlan(VectorPlan):
    """B runs over k, A over either; n is at least the lanes of a register, and k even."""

    @property
    def columns(self) -> int:
        """Vectors of columns in a panel."""
        return min(self.shape.n // self.lanes, PANEL_VECTORS)

    @property
    def width(self) -> int:
        return self.columns * self.lanes

    @property
    def depth(self) -> int:
        """k of a panel."""
        return math.gcd(self.shape.k, PANEL_DEPTH)

    @property
    def rows(self) -> int:
        """Rows of A in one block."""
        return min(
            self.shape.m, ROWS_BY_FULL_PANEL if self.columns == PANEL_VECTORS else ROWS_BY_NARROW_PANEL
        )

    @property
    def skips_rows(self) -> bool:
        return self.shape.m > 1

    @property
    def pairs_of_k(self) -> int:
        return self.shape.k // 2

    @property
    def a_strides(self) -> tuple[int, int]:
        """Of the packed A, in pairs: from row to row and from pair to pair of k."""
        if self.a_over == "outer":
            return self.pairs_of_k + PADDING, 1
        return 1, self.shape.m + PADDING

    @property
    def a_bytes(self) -> int:
        across, along = self.a_strides
        lines = self.shape.m if along == 1 else self.pairs_of_k
        return max(across, along) * lines * BYTES["i32"]

    @property
    def b_bytes(self) -> int:
        return pointer_bytes(self.shape.k)

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        source, target = V("%pointers", "ptr"), V("%packed", "ptr")
        name = f"pairs.pack.{self.shape.name}.{self.a_over}"
        body = self._copy_rows if self.a_over == "outer" else self._interleave_rows
        define(b.module, name, [source, target], lambda c: body(c, source, target))
        call(b, name, rows.pointers, packed)

    def _copy_rows(self, b: Builder, pointers: V, packed: V) -> None:
        lanes = math.gcd(self.pairs_of_k, self.lanes)

        def row(index: Index) -> None:
            (source,) = row_pointers(b, pointers, index, self.shape.m, 1)
            target = b.address(packed, b.multiply(index, self.a_strides[0]), "i32")
            b.repeat(self.pairs_of_k, lanes, lambda at: piece(source, target, at))

        def piece(source: V, target: V, at: Index) -> None:
            pairs = b.load(vector(lanes, "i32"), b.address(source, at, "i32"), align=2)
            b.store(pairs, b.address(target, at, "i32"))

        b.repeat(self.shape.m, 1, row)

    def _interleave_rows(self, b: Builder, pointers: V, packed: V) -> None:
        lanes = min(self.shape.m, self.lanes)

        def pair(index: Index) -> None:
            rows = row_pointers(b, pointers, b.multiply(index, 2), self.shape.k, 2)
            target = b.address(packed, b.multiply(index, self.a_strides[1]), "i32")
            b.repeat(
                self.shape.m,
                lanes,
                lambda at: b.store(interleave(b, rows, at, lanes), b.address(target, at, "i32"), align=4),
            )

        b.repeat(self.pairs_of_k, 1, pair)

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        copy_pointers(b, rows.pointers, rows.count, packed)

    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        parameters = [V("%a", "ptr"), V("%b", "ptr"), V("%sums", "ptr"), V("%rows", "i64")]
        name = f"pairs.outer.{self.shape.name}.{self.a_over}"
        rows = constant(self.shape.m, "i64") if used is None else used
        define(b.module, name, parameters, lambda c: _outer(c, self, *parameters))
        call(b, name, packed_a, packed_b, accumulator, rows)


def interleave(b: Builder, rows: Sequence[V], at: Index, lanes: int) -> V:
    """Pairs of the elements of two rows from `at` on, 2 * lanes of i16."""
    even, odd = (b.load(vector(lanes, "i16"), b.address(row, at, "i16")) for row in rows)
    return b.shuffle(even, odd, [lane + of for lane in range(lanes) for of in (0, lanes)])


def _outer(b: Builder, plan: OuterPairsPlan, a: V, pointers: V, sums: V, rows: V) -> None:
    panel = b.allocate("i32", plan.depth // 2 * plan.width)

    def columns(first_k: Index, column: Index) -> None:
        _fill_panel(b, plan, pointers, panel, first_k, column)
        each_block(b, 0, rows, plan.rows, partial(_outer_block, b, plan, (a, panel, sums), (first_k, column)))

    b.repeat(
        plan.shape.k,
        plan.depth,
        lambda first_k: b.repeat(plan.shape.n, plan.width, lambda column: columns(first_k, column)),
    )


def _fill_panel(
    b: Builder, plan: OuterPairsPlan, pointers: V, panel: V, first_k: Index, column: Index
) -> None:
    """[depth / 2][width] pairs of B."""

    def pair(index: Index) -> None:
        rows = row_pointers(b, pointers, b.add(first_k, b.multiply(index, 2)), plan.shape.k, 2)
        target = b.address(panel, b.multiply(index, plan.width), "i32")
        for at in range(0, plan.width, plan.lanes):
            line = interleave(b, rows, b.add(column, at), plan.lanes)
            b.store(line, b.address(target, at, "i32"), align=64)

    b.repeat(plan.depth // 2, 1, pair)


def _outer_block(
    b: Builder,
    plan: OuterPairsPlan,
    buffers: tuple[V, V, V],
    at: tuple[Index, Index],
    row: Index,
    count: int,
) -> None:
    """Products of `count` rows of A with the panel, added to their sums."""
    (a, panel, sums), (first_k, column) = buffers, at
    across, along = plan.a_strides
    start = b.add(b.multiply(row, across), b.multiply(b.divide(first_k, 2), along))
    numbers = b.address(a, start, "i32")
    places = [
        b.address(sums, b.add(b.multiply(b.add(row, i), plan.shape.n), b.add(column, offset)), "float")
        for i in range(count)
        for offset in range(0, plan.width, plan.lanes)
    ]

    def step(pair: V, totals: list[V]) -> Sequence[V]:
        line = b.address(panel, b.multiply(pair, plan.width), "i32")
        columns = [
            b.load(vector(plan.lanes, "i32"), b.address(line, offset, "i32"), align=64)
            for offset in range(0, plan.width, plan.lanes)
        ]
        place = b.address(numbers, b.multiply(pair, along), "i32")
        rows = [
            b.splat(b.load("i32", b.address(place, i * across, "i32"), align=2), plan.lanes)
            for i in range(count)
        ]
        factors = [(x, y) for x in rows for y in columns]
        return [multiply_add(b, x, y, total) for (x, y), total in zip(factors, totals, strict=True)]

    started = [b.load(vector(plan.lanes, "float"), place) for place in places]
    for total, place in zip(b.loop(0, plan.depth // 2, 1, step, started), places, strict=True):
        b.store(total, place)
