"""The products of AMX tiles: T += P Q with all of k inside the tile registers.

P in tiles of its own (`copies`) is multiplied in blocks of 2 x 2 tiles. P that streams from memory is read once: a
tile of it by up to 6 of Q, whose sums fill the registers, so that the cache has to deliver little besides the stream.

A tile of a streamed P takes rows that lie some rows apart: its 16 streams run on in the next tile where they ended in
this one, and the hardware, which prefetches within a page of 4 KiB, finds few streams in each. It still has to begin
anew at every page; the first lines of the rows to come are therefore fetched ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moecc.codegen.x86.amx_pack import (
    ROW_BYTES,
    TILE,
    TILE_BYTES,
    Group,
    Operand,
    begin_row,
    group_of_table,
)
from moecc.codegen.x86.builder import Builder, Index, V, constant

WIDEST = 6
"""Sums of one tile of P that fit in the registers beside it and one of Q."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Operands, and whether P lies in tiles of its own."""

    p: Operand
    q: Operand
    copies: bool
    lane: str

    @property
    def name(self) -> str:
        return f"{self.p.name}.{self.q.name}.{self.copies}"

    @property
    def t_row_bytes(self) -> int:
        return self.q.groups * ROW_BYTES


Finish = Callable[[Index, Callable[[Index], list[V]]], None]
"""What becomes of a group of P, given where the 16 rows of its product with a group of Q lie."""


def emit_product(
    b: Builder, product: Product, p: V, q: V, q_groups: V, t: V, finish: Finish | None = None
) -> None:
    """T += P Q for the first `q_groups` of Q; with `finish` from zero, and T is scratch that it gets to see."""
    body = _multiply_tiles if product.copies else _multiply_stream
    body(b, product, p, q, q_groups, t, finish)


def _tile_load(b: Builder, register: int, place: V, stride: V) -> None:
    b.call("llvm.x86.tileloadd64", "void", constant(register, "i8"), place, stride)


def _tile_store(b: Builder, register: int, place: V, stride: V) -> None:
    b.call("llvm.x86.tilestored64", "void", constant(register, "i8"), place, stride)


def _tile_multiply(b: Builder, product: Product, total: int, p: int, q: int) -> None:
    name = "tdpbssd" if product.lane == "i32" else "tdpbf16ps"
    b.call(f"llvm.x86.{name}", "void", *(constant(register, "i8") for register in (total, p, q)))


def _bytes(count: int) -> V:
    return constant(count, "i64")


def _begin_sums(b: Builder, places: Sequence[V], stride: V, *, from_zero: bool) -> None:
    for register, place in enumerate(places):
        if from_zero:
            b.call("llvm.x86.tilezero", "void", constant(register, "i8"))
        else:
            _tile_load(b, register, place, stride)


def _multiply_tiles(
    b: Builder, product: Product, p: V, q: V, q_groups: V, t: V, finish: Finish | None
) -> None:
    """What T has of a block of P is finished while it is in the first cache."""
    p_block = min(2, product.p.groups)
    q_block = min(2 if p_block == 2 else 4, product.q.groups)
    strip_bytes = TILE * product.t_row_bytes

    def of_rows(p_first: Index) -> None:
        rows = b.address(p, b.multiply(p_first, product.p.k_tiles * TILE_BYTES), "i8")
        strips = t if finish else b.address(t, b.multiply(p_first, strip_bytes), "i8")

        def block(q_first: V, _: list[V]) -> tuple[()]:
            columns = b.address(q, b.multiply(q_first, product.q.k_tiles * TILE_BYTES), "i8")
            tiles = b.address(strips, b.multiply(q_first, ROW_BYTES), "i8")
            _multiply_block(b, product, (p_block, q_block), rows, columns, tiles, from_zero=bool(finish))
            return ()

        b.loop(0, q_groups, q_block, block)
        for i in range(p_block if finish else 0):
            assert finish is not None
            finish(
                b.add(p_first, i), partial(_rows_of_strip, b, product, b.address(t, i * strip_bytes, "i8"))
            )

    b.repeat(product.p.groups, p_block, of_rows)


def _rows_of_strip(b: Builder, product: Product, strip: V, q_group: Index) -> list[V]:
    tile = b.address(strip, b.multiply(q_group, ROW_BYTES), "i8")
    return [b.address(tile, row * product.t_row_bytes, "i8") for row in range(TILE)]


def _multiply_block(
    b: Builder, product: Product, block: tuple[int, int], p: V, q: V, t: V, *, from_zero: bool
) -> None:
    (p_block, q_block), k_tiles = block, product.p.k_tiles
    sums = [(i, j) for i in range(p_block) for j in range(q_block)]
    row, line = _bytes(product.t_row_bytes), _bytes(ROW_BYTES)
    places = [b.address(t, i * TILE * product.t_row_bytes + j * ROW_BYTES, "i8") for i, j in sums]
    rows = [b.address(p, i * k_tiles * TILE_BYTES, "i8") for i in range(p_block)]
    columns = [b.address(q, j * k_tiles * TILE_BYTES, "i8") for j in range(q_block)]
    spare = range(len(sums) + p_block, 8)
    q_registers = [spare[j % len(spare)] for j in range(q_block)]
    _begin_sums(b, places, row, from_zero=from_zero)

    def step(k: Index) -> None:
        for i, start in enumerate(rows):
            _tile_load(b, len(sums) + i, b.address(start, b.multiply(k, TILE_BYTES), "i8"), line)
            for j, column in enumerate(columns):
                if i == 0:
                    _tile_load(b, q_registers[j], b.address(column, b.multiply(k, TILE_BYTES), "i8"), line)
                _tile_multiply(b, product, i * q_block + j, len(sums) + i, q_registers[j])

    b.repeat(k_tiles, 1, step)
    for register, tile in enumerate(places):
        _tile_store(b, register, tile, row)


@dataclass(frozen=True)
class _Stream:
    """Rows of P as a tile's: where the first begins and how far they are apart."""

    start: V
    stride: V


def _multiply_stream(
    b: Builder, product: Product, p: V, q: V, q_groups: V, t: V, finish: Finish | None
) -> None:
    """What T has of groups that alternate is finished while it is in the cache."""
    apart = product.p.apart

    def of_group(group: Index, sums: _Sums) -> None:
        rows, ahead = group_of_table(b, p, group), group_of_table(b, p, b.add(group, 1))
        _all_sums(b, product, rows, ahead, q, q_groups, sums)

    def in_place(group: Index) -> None:
        chunk = b.multiply(b.divide(group, apart), apart * TILE * product.t_row_bytes)
        row = b.multiply(b.remainder(group, apart), product.t_row_bytes)
        start = b.address(t, b.add(chunk, row), "i8")
        of_group(group, _Sums(start, apart * product.t_row_bytes, ROW_BYTES, from_zero=False))

    def chunk(first: Index) -> None:
        def from_zero(i: Index) -> None:
            start = b.address(t, b.multiply(i, product.q.groups * TILE_BYTES), "i8")
            of_group(b.add(first, i), _Sums(start, ROW_BYTES, TILE_BYTES, from_zero=True))

        assert finish is not None
        b.repeat(apart, 1, from_zero)
        b.repeat(apart, 1, lambda i: finish(b.add(first, i), partial(_alternating_rows, b, product, t, i)))

    if finish is None:
        b.repeat(product.p.groups, 1, in_place)
    else:
        b.repeat(product.p.groups, apart, chunk)


def _alternating_rows(b: Builder, product: Product, t: V, group: Index, q_group: Index) -> list[V]:
    """16 neighbouring rows of the chunk that T holds; tile by tile, each with every so many of the rows."""
    apart = product.p.apart
    first = b.add(b.multiply(group, TILE // apart * ROW_BYTES), b.multiply(q_group, TILE_BYTES))
    start = b.address(t, first, "i8")
    return [
        b.address(start, row % apart * product.q.groups * TILE_BYTES + row // apart * ROW_BYTES, "i8")
        for row in range(TILE)
    ]


@dataclass(frozen=True)
class _Sums:
    """Where tiles of T lie: the first one, the bytes from row to row and from tile to tile."""

    start: V
    row_bytes: int
    tile_bytes: int
    from_zero: bool


def _all_sums(
    b: Builder, product: Product, rows: Group, ahead: Group, q: V, q_groups: V, sums: _Sums
) -> None:
    """The sums of one tile's rows of P, as many at a time as the registers hold."""
    widest = min(WIDEST, product.q.groups)

    def some(first: Index) -> None:
        columns = b.address(q, b.multiply(first, product.q.k_tiles * TILE_BYTES), "i8")
        tiles = replace(sums, start=b.address(sums.start, b.multiply(first, sums.tile_bytes), "i8"))
        left = b.op("sub", q_groups, first) if isinstance(first, V) else q_groups
        count = b.intrinsic("llvm.smin", "i64", left, _bytes(widest))
        for size in range(1, widest + 1):
            b.choose(
                b.compare("icmp eq", count, _bytes(size)),
                partial(_multiply_row, b, product, rows, ahead, columns, tiles, size),
            )

    b.repeat(product.q.groups, widest, some)


def _multiply_row(
    b: Builder, product: Product, rows: Group, ahead: Group, q: V, sums: _Sums, count: int
) -> None:
    row, line = _bytes(sums.row_bytes), _bytes(ROW_BYTES)
    places = [b.address(sums.start, j * sums.tile_bytes, "i8") for j in range(count)]
    columns = [b.address(q, j * product.q.k_tiles * TILE_BYTES, "i8") for j in range(count)]
    _begin_sums(b, places, row, from_zero=sums.from_zero)

    def step(k: Index) -> None:
        _tile_load(b, 6, b.address(rows.start, b.multiply(k, ROW_BYTES), "i8"), rows.stride)
        for register, column in enumerate(columns):
            _tile_load(b, 7, b.address(column, b.multiply(k, TILE_BYTES), "i8"), line)
            _tile_multiply(b, product, register, 6, 7)

    _steps(b, product.p.k_tiles, step, ahead)
    for register, place in enumerate(places):
        _tile_store(b, register, place, row)


def _steps(b: Builder, k_tiles: int, step: Callable[[Index], None], ahead: Group) -> None:
    """All steps of k; during the last ones the rows to come are begun, a row or a few in each."""
    rows_per_step = -(-TILE // k_tiles)
    heads = TILE // rows_per_step
    first = k_tiles - heads

    def begin(k: Index) -> None:
        step(b.add(k, first))
        for i in range(rows_per_step):
            begin_row(b, ahead, b.add(b.multiply(k, rows_per_step), i))

    if first:
        b.repeat(first, 1, step)
    b.repeat(heads, 1, begin)
