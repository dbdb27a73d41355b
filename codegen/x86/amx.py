"""tl.dot on AMX tiles: bf16 and 8-bit floats, which are bf16 exactly, into float; int8 into i32.

A tile product is T[16, 16] += P[16, depth] Q[depth, 16]. P is read as it lies in memory, rows with k contiguous; Q must
be packed, dwords of neighbouring k for each column. Weights [N, K] are P where they can be, so that they stream from
memory as they are; then T is a tile of the transposed result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.codegen.x86.amx_pack import (
    GROUP_BYTES,
    ROW_BYTES,
    TILE,
    TILE_BYTES,
    Operand,
    pack_tiles,
    table_bytes,
    tabulate,
)
from moecc.codegen.x86.builder import Builder, Index, V
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over, Rows, call, define
from moecc.codegen.x86.pack import transpose, widen
from moecc.codegen.x86.types import LLVM_TYPES

ONE_PASS_GROUPS = 4
"""As many groups of Q fill the registers beside one of P, which is then read from memory in one even stream."""

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

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        (self._pack_q if self.b_first else self._pack_p)(b, rows, packed)

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        (self._pack_p if self.b_first else self._pack_q)(b, rows, packed)

    def _pack_q(self, b: Builder, rows: Rows, packed: V) -> None:
        pack_tiles(b, self.q, rows.pointers, packed, transposed=self.q.over == "outer")

    def _pack_p(self, b: Builder, rows: Rows, packed: V) -> None:
        if self.copies:
            pack_tiles(b, self.p, rows.pointers, packed, transposed=self.p.over == "k")
        else:
            tabulate(b, self.p, rows.pointers, packed)

    def add_product(self, b: Builder, packed_a: V, packed_b: V, accumulator: V) -> None:
        b.module.globals.setdefault("tilecfg", TILECFG)
        p, q = (packed_b, packed_a) if self.b_first else (packed_a, packed_b)
        name = f"amx.multiply.{self.p.name}.{self.q.name}.{self.copies}"
        parameters = [V("%p", "ptr"), V("%q", "ptr"), V("%t", "ptr")]
        define(b.module, name, parameters, lambda c: _multiply(c, self, *parameters))
        call(b, name, p, q, accumulator)

    def product(self, b: Builder, packed_a: V, packed_b: V, accumulator: V, rows: V) -> None:
        if self.plain or self.shape.rounds:
            super().product(b, packed_a, packed_b, accumulator, rows)
            return
        b.module.globals.setdefault("tilecfg", TILECFG)
        p, q = (packed_b, packed_a) if self.b_first else (packed_a, packed_b)
        name = f"amx.product.{self.p.name}.{self.q.name}.{self.copies}.{self.shape.accumulator}"
        parameters = [V("%p", "ptr"), V("%q", "ptr"), V("%t", "ptr"), V("%rows", "ptr")]
        define(b.module, name, parameters, lambda c: _product(c, self, *parameters))
        call(b, name, p, q, accumulator, rows)

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


def _tile_to_rows(b: Builder, plan: TilePlan, groups: tuple[Index, Index], t: V, rows: V, stage: V) -> None:
    _lines_to_rows(b, plan, groups, _t_tile(b, plan, *groups, t), rows)


def _lines_to_rows(b: Builder, plan: TilePlan, groups: tuple[Index, Index], tile: V, rows: V) -> None:
    """A tile that lies within T, wherever that is, into its place among the rows."""
    lane, element = plan.shape.lane, LLVM_TYPES[plan.shape.accumulator]
    places = [b.address(tile, r * plan.q.groups * TILE, lane) for r in range(TILE)]
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


def _multiply(b: Builder, plan: TilePlan, p: V, q: V, t: V) -> None:
    """Blocks of tiles of T, P's outermost so that it is read once from memory; all of k within the tile registers."""
    p_block, q_block = _register_block(plan)
    b.repeat(
        plan.p.groups,
        p_block,
        lambda i: b.repeat(
            plan.q.groups, q_block, lambda j: _multiply_block(b, plan, (i, j), (p_block, q_block), p, q, t)
        ),
    )


def _product(b: Builder, plan: TilePlan, p: V, q: V, t: V, rows: V) -> None:
    """As `_multiply` from zero; what T has of a block of P goes to its rows while it is in the first cache."""
    p_block, q_block = _register_block(plan)

    def strip(i: Index) -> None:
        def block(j: Index) -> None:
            _multiply_block(b, plan, (i, j), (p_block, q_block), p, q, t, strip=True)

        b.repeat(plan.q.groups, q_block, block)
        for row in range(p_block):

            def place(j: Index, row: int = row) -> None:
                _lines_to_rows(b, plan, (b.add(i, row), j), _t_tile(b, plan, row, j, t), rows)

            b.repeat(plan.q.groups, 1, place)

    b.repeat(plan.p.groups, p_block, strip)


def _register_block(plan: TilePlan) -> tuple[int, int]:
    """Groups of P and of Q whose sums the registers hold at a time."""
    p_block = 1 if plan.q.groups == ONE_PASS_GROUPS and not plan.copies else min(2, plan.p.groups)
    return p_block, min(2 if p_block == 2 else 4, plan.q.groups)


def _multiply_block(
    b: Builder,
    plan: TilePlan,
    first: tuple[Index, Index],
    block: tuple[int, int],
    p: V,
    q: V,
    t: V,
    *,
    strip: bool = False,
) -> None:
    """Add a block's products to T, or with `strip` set them in a T that holds these groups of P alone."""
    (p_first, q_first), (p_block, q_block) = first, block
    sums = [(i, j) for i in range(p_block) for j in range(q_block)]
    t_row = 0 if strip else p_first
    tiles = [_t_tile(b, plan, b.add(t_row, i), b.add(q_first, j), t) for i, j in sums]
    t_stride = V(str(plan.q.groups * ROW_BYTES), "i64")
    for register, tile in enumerate(tiles):
        if strip:
            b.call("llvm.x86.tilezero", "void", V(str(register), "i8"))
        else:
            _tile_load(b, register, tile, t_stride)
    streams = [_p_stream(b, plan, b.add(p_first, i), p) for i in range(p_block)]
    columns = [
        b.address(q, b.multiply(b.add(q_first, j), plan.q.k_tiles * TILE_BYTES), "i8") for j in range(q_block)
    ]
    p_registers = [len(sums) + i for i in range(p_block)]
    spare = range(len(sums) + p_block, 8)
    q_registers = [spare[j % len(spare)] for j in range(q_block)]
    p_step = TILE_BYTES if plan.copies else ROW_BYTES
    product = "tdpbssd" if plan.shape.lane == "i32" else "tdpbf16ps"

    def step(k: Index) -> None:
        for i, (start, stride) in enumerate(streams):
            _tile_load(b, p_registers[i], b.address(start, b.multiply(k, p_step), "i8"), stride)
            for j, column in enumerate(columns):
                if i == 0:
                    place = b.address(column, b.multiply(k, TILE_BYTES), "i8")
                    _tile_load(b, q_registers[j], place, V(str(ROW_BYTES), "i64"))
                registers = (i * q_block + j, p_registers[i], q_registers[j])
                b.call(f"llvm.x86.{product}", "void", *[V(str(r), "i8") for r in registers])

    b.repeat(plan.p.k_tiles, 1, step)
    for register, tile in enumerate(tiles):
        b.call("llvm.x86.tilestored64", "void", V(str(register), "i8"), tile, t_stride)


def _tile_load(b: Builder, register: int, place: V, stride: V) -> None:
    b.call("llvm.x86.tileloadd64", "void", V(str(register), "i8"), place, stride)


def _p_stream(b: Builder, plan: TilePlan, group: Index, p: V) -> tuple[V, V]:
    """Address of a group's first tile and the distance of its rows."""
    if plan.copies:
        place = b.address(p, b.multiply(group, plan.p.k_tiles * TILE_BYTES), "i8")
        return place, V(str(ROW_BYTES), "i64")
    entry = b.address(p, b.multiply(group, GROUP_BYTES), "i8")
    return b.load("ptr", entry), b.load("i64", b.address(entry, 8, "i8"))
