"""tl.dot on AMX tiles: bf16 and 8-bit floats, which are bf16 exactly, into float; int8 into i32.

A tile product is T[16, 16] += P[16, depth] Q[depth, 16]. P is read as it lies in memory, rows with k contiguous; Q must
be packed, dwords of neighbouring k for each column. Weights [N, K] are P where they can be, so that they stream from
memory as they are; then T is a tile of the transposed result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moecc.codegen.x86.amx_multiply import Product, emit_product
from moecc.codegen.x86.amx_pack import (
    ROW_BYTES,
    TILE,
    TILE_BYTES,
    Operand,
    pack_tiles,
    table_bytes,
    tabulate,
)
from moecc.codegen.x86.builder import Builder, Index, V, constant
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over, Rows, call, define
from moecc.codegen.x86.pack import transpose, widen
from moecc.codegen.x86.types import LLVM_TYPES

STREAMED_COLUMNS = 256
"""Up to as many columns of Q, to copy P into tiles costs more than to read it again from rows far apart."""

TILECFG = (
    "@tilecfg = internal constant [64 x i8] ["
    + ", ".join(
        f"i8 {byte}" for byte in [1, *[0] * 15, *[ROW_BYTES, 0] * 8, *[0] * 16, *[TILE] * 8, *[0] * 8]
    )
    + "], align 64"
)
"""Operand of ldtilecfg: palette 1, eight tiles of 16 rows of 64 bytes."""

_FLOATS = ("bf16", "f8E4M3FN", "f8E5M2")


def plan_tiles(shape: DotShape, *, a_over: Over, b_over: Over) -> TilePlan | None:
    """A plan, or None for what tiles cannot compute: other elements, or less than one tile's rows of P."""
    integers = (shape.a, shape.b, shape.accumulator) == ("i8", "i8", "i32")
    floats = shape.a in _FLOATS and shape.b in _FLOATS and shape.lane == "float"
    if not (integers or floats) or max(shape.m, shape.n) < TILE:
        return None
    b_first = _b_first(shape, a_over, b_over)
    columns = shape.m if b_first else shape.n
    return TilePlan(
        shape=shape, a_over=a_over, b_over=b_over, b_first=b_first, copy=columns > STREAMED_COLUMNS
    )


def _b_first(shape: DotShape, a_over: Over, b_over: Over) -> bool:
    """The operand that fills a tile's rows; the one with k contiguous; of two the larger, of none the smaller."""
    if min(shape.m, shape.n) < TILE:
        return shape.n >= shape.m
    if a_over != b_over:
        return b_over == "outer"
    return shape.n >= shape.m if b_over == "outer" else shape.n < shape.m


@dataclass(frozen=True, kw_only=True)
class TilePlan(DotPlan):
    """`b_first` makes B the P of the products, else A is; the accumulator is the row-major T of P by Q.

    `copy` packs P into tiles though it could be read from its own memory. That pays where the packed P serves several
    products, or a product of many columns.
    """

    b_first: bool
    copy: bool = False
    uses_tiles: bool = True

    @property
    def p(self) -> Operand:
        return self._b if self.b_first else self._a

    @property
    def q(self) -> Operand:
        return self._a if self.b_first else self._b

    @property
    def _a(self) -> Operand:
        return Operand(count=self.shape.m, k=self.shape.k, element=self.shape.a, over=self.a_over)

    @property
    def _b(self) -> Operand:
        return Operand(count=self.shape.n, k=self.shape.k, element=self.shape.b, over=self.b_over)

    @property
    def copies(self) -> bool:
        """Whether P is packed into tiles, not read from its own memory."""
        return self.copy or self.p.over == "k" or not self.p.whole

    @property
    def a_bytes(self) -> int:
        return self._q_bytes if self.b_first else self._p_bytes

    @property
    def b_bytes(self) -> int:
        return self._p_bytes if self.b_first else self._q_bytes

    @property
    def _p_bytes(self) -> int:
        table = 0 if self.copies else table_bytes(self.p)
        return table + self.p.tiles * TILE_BYTES

    @property
    def _q_bytes(self) -> int:
        return self.q.tiles * TILE_BYTES

    @property
    def accumulator_bytes(self) -> int:
        return self.p.groups * self.q.groups * TILE_BYTES

    @property
    def plain(self) -> bool:
        return super().plain and not self.b_first and self.q.count >= TILE

    @property
    def skips_rows(self) -> bool:
        return self.b_first and self.q.groups > 1

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        (self._pack_q if self.b_first else self._pack_p)(b, rows, packed)

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        (self._pack_p if self.b_first else self._pack_q)(b, rows, packed)

    def _pack_q(self, b: Builder, rows: Rows, packed: V) -> None:
        groups = self._q_groups(b, rows.used)
        pack_tiles(b, self.q, groups, rows.pointers, packed, transposed=self.q.over == "outer")

    def _pack_p(self, b: Builder, rows: Rows, packed: V) -> None:
        if self.copies:
            groups = constant(self.p.groups, "i64")
            pack_tiles(b, self.p, groups, rows.pointers, packed, transposed=self.p.over == "k")
        else:
            tabulate(b, self.p, rows.pointers, packed)

    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        self._call(b, "multiply", emit_product, (packed_a, packed_b), [accumulator], used)

    def product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, rows: V, used: V | None = None
    ) -> None:
        if self.plain or self.shape.rounds:
            super().product(b, packed_a, packed_b, accumulator, rows, used)
            return

        def emit(c: Builder, product: Product, p: V, q: V, q_groups: V, t: V, rows: V) -> None:
            def finish(p_group: Index, rows_of: Callable[[Index], list[V]]) -> None:
                _group_to_rows(c, self, p_group, q_groups, rows_of, rows)

            emit_product(c, product, p, q, q_groups, t, finish)

        name = f"product.{self.shape.accumulator}"
        self._call(b, name, emit, (packed_a, packed_b), [accumulator, rows], used)

    def _call(
        self,
        b: Builder,
        name: str,
        emit: Callable[..., None],
        packed: tuple[V, V],
        results: Sequence[V],
        used: V | None,
    ) -> None:
        b.module.globals.setdefault("tilecfg", TILECFG)
        product = Product(p=self.p, q=self.q, copies=self.copies, lane=self.shape.lane)
        p, q = packed[::-1] if self.b_first else packed
        arguments = [p, q, self._q_groups(b, used), *results]
        parameters = [V(f"%argument{i}", argument.type) for i, argument in enumerate(arguments)]
        name = f"amx.{name}.{product.name}"
        define(b.module, name, parameters, lambda c: emit(c, product, *parameters))
        call(b, name, *arguments)

    def _q_groups(self, b: Builder, used: V | None) -> V:
        """Groups of Q with a row that has a reader."""
        if used is None or not self.skips_rows:
            return constant(self.q.groups, "i64")
        return b.op("udiv", b.op("add", used, constant(TILE - 1, "i64")), constant(TILE, "i64"))

    def to_rows(self, b: Builder, accumulator: V, rows: V) -> None:
        self._relayout(b, "to", accumulator, rows, _tile_to_rows)

    def from_rows(self, b: Builder, rows: V, accumulator: V) -> None:
        self._relayout(b, "from", accumulator, rows, _tile_from_rows)

    def _relayout(self, b: Builder, way: str, accumulator: V, rows: V, body: _Relayout) -> None:
        name = f"amx.{way}.{self.shape.name}.{self.b_first}"
        t, result = V("%t", "ptr"), V("%rows", "ptr")

        def emit(c: Builder) -> None:
            stage = c.allocate(self.shape.lane, TILE * TILE)
            c.repeat(
                self.p.groups,
                1,
                lambda i: c.repeat(self.q.groups, 1, lambda j: body(c, self, (i, j), t, result, stage)),
            )

        define(b.module, name, [t, result], emit)
        call(b, name, accumulator, rows)


_Relayout = Callable[[Builder, TilePlan, tuple[Index, Index], V, V, V], None]


def _t_tile(b: Builder, plan: TilePlan, p_group: Index, q_group: Index, t: V) -> V:
    columns = plan.q.groups * TILE
    place = b.add(b.multiply(p_group, TILE * columns), b.multiply(q_group, TILE))
    return b.address(t, place, plan.shape.lane)


def _block(b: Builder, plan: TilePlan, groups: tuple[Index, Index], rows: V) -> tuple[V, int, int]:
    """Where the tile's numbers lie in the row-major result: address, rows and columns."""
    row, column = groups[::-1] if plan.b_first else groups
    n, element = plan.shape.n, LLVM_TYPES[plan.shape.accumulator]
    place = b.add(b.multiply(row, TILE * n), b.multiply(column, TILE))
    return b.address(rows, place, element), min(TILE, plan.shape.m), min(TILE, n)


def _group_to_rows(
    b: Builder, plan: TilePlan, p_group: Index, q_groups: V, rows_of: Callable[[Index], list[V]], rows: V
) -> None:
    """A group of P's products with groups of Q, each of which has its 16 rows somewhere, to their places."""

    def place(q_group: V, _: list[V]) -> tuple[()]:
        _lines_to_rows(b, plan, (p_group, q_group), rows_of(q_group), rows)
        return ()

    b.loop(0, q_groups, 1, place)


def _tile_to_rows(b: Builder, plan: TilePlan, groups: tuple[Index, Index], t: V, rows: V, stage: V) -> None:
    tile, lane = _t_tile(b, plan, *groups, t), plan.shape.lane
    lines = [b.address(tile, r * plan.q.groups * TILE, lane) for r in range(TILE)]
    _lines_to_rows(b, plan, groups, lines, rows)


def _lines_to_rows(b: Builder, plan: TilePlan, groups: tuple[Index, Index], places: list[V], rows: V) -> None:
    """A tile, given where its lines are, into its place among the rows."""
    lane, element = plan.shape.lane, LLVM_TYPES[plan.shape.accumulator]
    block, height, width = _block(b, plan, groups, rows)
    lines = transpose(b, places, lane) if plan.b_first else _whole_lines(b, places, lane)
    for r, line in enumerate(lines[:height]):
        short = line if width == TILE else b.shuffle(line, line, range(width))
        b.store(b.cast("fptrunc", short, element), b.address(block, r * plan.shape.n, element))


def _whole_lines(b: Builder, places: list[V], lane: str) -> list[V]:
    return [b.load(f"<{TILE} x {lane}>", place) for place in places]


def _tile_from_rows(b: Builder, plan: TilePlan, groups: tuple[Index, Index], t: V, rows: V, stage: V) -> None:
    shape, lane = plan.shape, plan.shape.lane
    block, height, width = _block(b, plan, groups, rows)
    tile = _t_tile(b, plan, *groups, t)
    staged = [b.address(stage, r * TILE, lane) for r in range(TILE)]
    for r in range(height):
        place = b.address(block, r * shape.n, LLVM_TYPES[shape.accumulator])
        b.store(widen(b, place, width, shape.accumulator, lane), staged[r])
    lines = transpose(b, staged, lane) if plan.b_first else _whole_lines(b, staged, lane)
    for r, line in enumerate(lines):
        b.store(line, b.address(tile, r * plan.q.groups * TILE, lane))
