"""Operands of AMX tile products: packed into tiles of 16 rows of 64 bytes, or located in their own memory.

A tile of P holds 16 rows with k contiguous; a tile of Q 16 rows of dwords, each of 2 (bf16) or 4 (int8) neighbouring k
of one column. Either is the transposition, by dwords, of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, Index, V, constant, constants, vector
from moecc.codegen.x86.dot_shape import Over, call, define
from moecc.codegen.x86.pack import bfloat_bits, element_bytes, row_pointers, transpose

TILE = 16
"""Rows of a tile, and its columns of 4 bytes."""
ROW_BYTES = 64
TILE_BYTES = TILE * ROW_BYTES
ALTERNATING_GROUPS = 8
"""A power of two up to 16; the results of so many groups should stay in the second cache, at best in the first."""
HEAD_LINES = 4
"""Of a row to come: 2 to 8 start the hardware's prefetcher as well; to fetch whole rows was slower than none."""
GROUP_BYTES = 16
"""A group of 16 rows in the table of `tabulate`: the first row's address, the distance of rows in bytes."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """`count` rows or columns of k elements. Tiles run [group of 16, step of k]."""

    count: int
    k: int
    element: str
    over: Over

    @property
    def lane(self) -> str:
        """As tiles hold it; i16 is the bits of a bfloat."""
        return "i8" if self.element == "i8" else "i16"

    @property
    def per_dword(self) -> int:
        return 4 if self.lane == "i8" else 2

    @property
    def depth(self) -> int:
        """k of one tile."""
        return TILE * self.per_dword

    @property
    def groups(self) -> int:
        return -(-self.count // TILE)

    @property
    def apart(self) -> int:
        """Groups whose rows alternate where the operand streams from memory: those of a group lie so far apart."""
        return min(self.groups, ALTERNATING_GROUPS)

    @property
    def k_tiles(self) -> int:
        return -(-self.k // self.depth)

    @property
    def tiles(self) -> int:
        return self.groups * self.k_tiles

    @property
    def whole(self) -> bool:
        """Whether 64 bytes of a row with k contiguous are a row of a tile as they are."""
        return self.element in ("bf16", "i8") and self.k >= self.depth

    @property
    def name(self) -> str:
        return f"{self.count}x{self.k}.{self.element}.{self.over}"


def pack_tiles(b: Builder, operand: Operand, groups: V, pointers: V, packed: V, *, transposed: bool) -> None:
    """Write the tiles of the first groups at least: as the operand's rows run, or transposed by dwords."""
    parameters = [V("%groups", "i64"), V("%pointers", "ptr"), V("%packed", "ptr")]
    name = f"amx.pack.{operand.name}.{transposed}"
    define(b.module, name, parameters, lambda c: _pack_tiles(c, operand, *parameters, transposed=transposed))
    call(b, name, groups, pointers, packed)


def _pack_tiles(b: Builder, operand: Operand, groups: V, pointers: V, packed: V, *, transposed: bool) -> None:
    if operand.over == "outer" and not transposed:
        _copy_rows(b, operand, groups, pointers, packed)
        return
    stage = b.allocate("i8", TILE_BYTES) if transposed else packed
    staged = _lines(b, stage, ROW_BYTES)

    def tile(rows: list[V], group: Index, step: Index) -> None:
        target = _lines(b, _tile(b, operand, packed, group, step), ROW_BYTES)
        if not transposed:
            _fill(b, operand, rows, group, step, target)
            return
        sources = staged
        if operand.over == "outer" and operand.whole:
            sources = [b.address(row, b.multiply(step, ROW_BYTES), "i8") for row in rows]
        else:
            _fill(b, operand, rows, group, step, staged)
        for line, column in zip(target, transpose(b, sources, "i32"), strict=True):
            b.store(column, line, align=ROW_BYTES)

    _each_tile(b, operand, groups, pointers, tile)


def _tile(b: Builder, operand: Operand, packed: V, group: Index, step: Index) -> V:
    place = b.add(b.multiply(group, operand.k_tiles), step)
    return b.address(packed, b.multiply(place, TILE_BYTES), "i8")


def _copy_rows(b: Builder, operand: Operand, groups: V, pointers: V, packed: V) -> None:
    """Row by row, each along k: rows a power of two apart share a cache set."""

    def row(group: Index, line: Index) -> None:
        (source,) = row_pointers(b, pointers, b.add(b.multiply(group, TILE), line), operand.count, 1)
        target = b.address(packed, b.multiply(line, ROW_BYTES), "i8")
        b.repeat(
            operand.k_tiles,
            1,
            lambda step: b.store(
                _row_line(b, operand, source, step), _tile(b, operand, target, group, step), align=ROW_BYTES
            ),
        )

    _first(b, groups, lambda group: b.repeat(TILE, 1, lambda line: row(group, line)))


def _first(b: Builder, groups: V, body: Callable[[Index], None]) -> None:
    def once(group: V, _: list[V]) -> tuple[()]:
        body(group)
        return ()

    b.loop(0, groups, 1, once)


def _each_tile(
    b: Builder, operand: Operand, groups: V, pointers: V, tile: Callable[[list[V], Index, Index], None]
) -> None:
    """tile(rows that it reads, group, step of k); the operand's rows are walked along."""

    def of_group(group: Index) -> None:
        rows = row_pointers(b, pointers, b.multiply(group, TILE), operand.count, TILE)
        b.repeat(operand.k_tiles, 1, lambda step: tile(rows, group, step))

    def of_step(step: Index) -> None:
        rows = row_pointers(b, pointers, b.multiply(step, operand.depth), operand.k, operand.depth)
        _first(b, groups, lambda group: tile(rows, group, step))

    if operand.over == "outer":
        _first(b, groups, of_group)
    else:
        b.repeat(operand.k_tiles, 1, of_step)


def _lines(b: Builder, first: V, stride: int) -> list[V]:
    return [b.address(first, line * stride, "i8") for line in range(TILE)]


def _fill(
    b: Builder, operand: Operand, rows: list[V], group: Index, step: Index, target: Sequence[V]
) -> None:
    """The 16 lines of a tile as the operand's rows run; zero past the end of k."""
    if operand.over == "outer":
        lines = [_row_line(b, operand, row, step) for row in rows]
    else:
        lines = [_interleaved_line(b, operand, rows, group, line) for line in range(TILE)]
    for place, line in zip(target, lines, strict=True):
        b.store(line, place, align=1)


def _row_line(b: Builder, operand: Operand, row: V, step: Index) -> V:
    lanes = min(operand.k, operand.depth)
    line = _bits(b, operand, b.address(row, _offset(b, operand, step, operand.depth), "i8"), lanes)
    return line if lanes == operand.depth else _pad(b, line, operand.depth)


def _interleaved_line(b: Builder, operand: Operand, rows: list[V], group: Index, line: int) -> V:
    """Dwords of the line's neighbouring k, one for each of 16 columns; undefined past the last column."""
    lanes, bits = min(operand.count, TILE), 32 // operand.per_dword
    total = constant(0, "i32", lanes)
    for part in range(operand.per_dword):
        k = line * operand.per_dword + part
        if k >= operand.k:
            break
        place = b.address(rows[k], _offset(b, operand, group, TILE), "i8")
        dwords = b.cast("zext", _bits(b, operand, place, lanes), "i32")
        total = b.op("or", total, b.op("shl", dwords, constant(part * bits, "i32", lanes)))
    return total if lanes == TILE else _pad(b, total, TILE)


def _offset(b: Builder, operand: Operand, index: Index, elements: int) -> Index:
    return b.multiply(index, elements * element_bytes(operand.element))


def _bits(b: Builder, operand: Operand, place: V, lanes: int) -> V:
    if operand.lane == "i8":
        return b.load(vector(lanes, "i8"), place)
    return bfloat_bits(b, place, lanes, operand.element)


def _pad(b: Builder, line: V, lanes: int) -> V:
    zero = constant(0, line.lane_type, line.lanes)
    return b.shuffle(line, zero, [min(lane, line.lanes) for lane in range(lanes)])


def tabulate(b: Builder, operand: Operand, pointers: V, packed: V) -> None:
    """For each group of 16 whole rows its first address and the distance of rows; uneven groups are copied first.

    The rows of a group lie `apart` apart. One more group stands for the rows that lie behind the last one: they are
    not read, but often are the next operand's. The copies lie behind the table.
    """
    parameters = [V("%pointers", "ptr"), V("%packed", "ptr")]
    name = f"amx.tabulate.{operand.name}"
    define(b.module, name, parameters, lambda c: _tabulate(c, operand, *parameters))
    call(b, name, pointers, packed)


def table_bytes(operand: Operand) -> int:
    return -(-(operand.groups + 1) * GROUP_BYTES // ROW_BYTES) * ROW_BYTES


def _tabulate(b: Builder, operand: Operand, pointers: V, packed: V) -> None:
    copy_stride = operand.k_tiles * ROW_BYTES

    def of_group(group: Index) -> None:
        rows = _rows_apart(b, operand, pointers, group)
        addresses = _together(b, rows)
        start = b.extract(addresses, 0)
        stride = b.op("sub", b.extract(addresses, 1), start)
        steps = b.op("mul", b.splat(stride, TILE), constants(range(TILE), "i64"))
        expected = b.op("add", b.splat(start, TILE), steps)
        uneven = b.compare("icmp ne", addresses, expected)
        any_uneven = b.intrinsic("llvm.vector.reduce.or", "i1", uneven)

        def copy() -> list[V]:
            place = table_bytes(operand)
            copies = b.address(packed, b.add(b.multiply(group, TILE * copy_stride), place), "i8")
            b.repeat(operand.k_tiles, 1, lambda step: copy_step(rows, copies, step))
            return [b.cast("ptrtoint", copies, "i64"), constant(copy_stride, "i64")]

        def copy_step(rows: list[V], copies: V, step: Index) -> None:
            target = b.address(copies, b.multiply(step, ROW_BYTES), "i8")
            _fill(b, operand, rows, group, step, _lines(b, target, copy_stride))

        base, distance = b.choose(any_uneven, copy, lambda: [start, stride], likely=False)
        entry = b.address(packed, b.multiply(group, GROUP_BYTES), "i8")
        b.store(base, entry)
        b.store(distance, b.address(entry, 8, "i8"))

    b.repeat(operand.groups, 1, of_group)
    _foresee(b, operand, packed)


def _foresee(b: Builder, operand: Operand, table: V) -> None:
    """Begins the first group, and enters what may come after the last."""
    first, last = group_of_table(b, table, 0), group_of_table(b, table, operand.groups - 1)
    b.repeat(TILE, 1, lambda row: begin_row(b, first, row))
    behind = b.add(b.multiply(last.stride, TILE - 1), b.divide(last.stride, operand.apart))
    entry = b.address(table, operand.groups * GROUP_BYTES, "i8")
    b.store(b.address(last.start, behind, "i8"), entry)
    b.store(last.stride, b.address(entry, 8, "i8"))


@dataclass(frozen=True)
class Group:
    """16 rows of an operand: where the first begins and how far they are apart, in bytes."""

    start: V
    stride: V


def group_of_table(b: Builder, table: V, number: Index) -> Group:
    entry = b.address(table, b.multiply(number, GROUP_BYTES), "i8")
    return Group(b.load("ptr", entry), b.load("i64", b.address(entry, 8, "i8")))


def begin_row(b: Builder, group: Group, number: Index) -> None:
    """Asks memory for the first lines of a row: the hardware, which prefetches from there on, has to see some."""
    row = b.address(group.start, b.multiply(group.stride, number), "i8")
    read, into_l2, data = constant(0, "i32"), constant(2, "i32"), constant(1, "i32")
    for line in range(HEAD_LINES):
        b.intrinsic("llvm.prefetch", "void", b.address(row, line * ROW_BYTES, "i8"), read, into_l2, data)


def _rows_apart(b: Builder, operand: Operand, pointers: V, group: Index) -> list[V]:
    apart = operand.apart
    first = b.add(b.multiply(b.divide(group, apart), TILE * apart), b.remainder(group, apart))
    return [b.load("ptr", b.address(pointers, b.add(first, row * apart), "ptr")) for row in range(TILE)]


def _together(b: Builder, addresses: list[V]) -> V:
    total = V("poison", vector(len(addresses), "i64"))
    for lane, address in enumerate(addresses):
        total = b.insert(total, b.cast("ptrtoint", address, "i64"), lane)
    return total
