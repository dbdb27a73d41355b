"""Operands of vector products: widened to the lanes of the sums, in the order in which products read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, Index, V
from moecc.codegen.x86.dot_shape import Over, call, define
from moecc.codegen.x86.pack import row_pointers, transpose, widen
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

PADDING = 16
"""Lanes between the rows of a widened operand, so that those of a power of two do not share cache sets."""


@dataclass(frozen=True, kw_only=True)
class Widened:
    """`count` rows of `length` elements as lanes, PADDING lanes apart."""

    count: int
    length: int
    element: str
    lane: str
    lanes: int

    @property
    def stride(self) -> int:
        return self.length + PADDING

    @property
    def size_bytes(self) -> int:
        return self.count * self.stride * BYTES[self.lane]

    def pack(self, b: Builder, pointers: V, packed: V) -> None:
        source, target = V("%pointers", "ptr"), V("%packed", "ptr")
        name = f"fma.widen.{self.count}x{self.length}.{self.element}.{self.lane}"
        define(b.module, name, [source, target], lambda c: self._pack(c, source, target))
        call(b, name, pointers, packed)

    def _pack(self, b: Builder, pointers: V, packed: V) -> None:
        lanes = min(self.lanes, self.length)

        def row(index: Index) -> None:
            (source,) = row_pointers(b, pointers, index, self.count, 1)
            target = b.address(packed, b.multiply(index, self.stride), self.lane)
            b.repeat(self.length, lanes, lambda at: piece(source, target, at))

        def piece(source: V, target: V, at: Index) -> None:
            place = b.address(source, at, LLVM_TYPES[self.element])
            b.store(widen(b, place, lanes, self.element, self.lane), b.address(target, at, self.lane))

        b.repeat(self.count, 1, row)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """[k, n] as lanes in panels of `width` columns by `depth` of k: [k / depth][n / width][depth][width]."""

    n: int
    k: int
    element: str
    over: Over
    lane: str
    lanes: int
    width: int
    depth: int

    @property
    def size_bytes(self) -> int:
        return self.n * self.k * BYTES[self.lane]

    def place(self, b: Builder, packed: V, k: Index, column: Index) -> V:
        """Address of the row of a panel at (k, first column of the panel)."""
        panel = b.multiply(b.divide(k, self.depth), self.n * self.depth)
        row = b.add(b.multiply(column, self.depth), b.multiply(b.remainder(k, self.depth), self.width))
        return b.address(packed, b.add(panel, row), self.lane)

    def pack(self, b: Builder, pointers: V, packed: V) -> None:
        source, target = V("%pointers", "ptr"), V("%packed", "ptr")
        name = (
            f"fma.panels.{self.n}x{self.k}.{self.element}.{self.over}.{self.lane}.{self.width}x{self.depth}"
        )
        body = self._pack_along_n if self.over == "k" else self._pack_transposed
        define(b.module, name, [source, target], lambda c: body(c, source, target))
        call(b, name, pointers, packed)

    def _pack_along_n(self, b: Builder, pointers: V, packed: V) -> None:
        lanes = min(self.lanes, self.width)

        def row(k: Index) -> None:
            (source,) = row_pointers(b, pointers, k, self.k, 1)
            b.repeat(self.n, self.width, lambda column: piece(source, k, column))

        def piece(source: V, k: Index, column: Index) -> None:
            target = self.place(b, packed, k, column)
            for at in range(0, self.width, lanes):
                place = b.address(source, b.add(column, at), LLVM_TYPES[self.element])
                b.store(widen(b, place, lanes, self.element, self.lane), b.address(target, at, self.lane))

        b.repeat(self.k, 1, row)

    def _pack_transposed(self, b: Builder, pointers: V, packed: V) -> None:
        stage = b.allocate(self.lane, self.lanes * self.lanes)
        staged = [b.address(stage, line * self.lanes, self.lane) for line in range(self.lanes)]

        def panel(column: Index) -> None:
            for part in range(0, self.width, self.lanes):
                squares(column, part)

        def squares(column: Index, part: int) -> None:
            rows = row_pointers(b, pointers, b.add(column, part), self.n - part, self.lanes)
            b.repeat(self.k, self.lanes, lambda k: square(rows, column, part, k))

        def square(rows: Sequence[V], column: Index, part: int, k: Index) -> None:
            depth, width = min(self.k, self.lanes), min(self.width, self.lanes)
            places = [b.address(row, k, LLVM_TYPES[self.element]) for row in rows]
            if self.element_is_lane and depth == self.lanes:
                sources = places
            else:
                sources = staged
                for place, line in zip(places, staged, strict=True):
                    b.store(widen(b, place, depth, self.element, self.lane), line)
            target = b.address(self.place(b, packed, k, column), part, self.lane)
            for at, line in enumerate(transpose(b, sources, self.lane)[:depth]):
                short = line if width == self.lanes else b.shuffle(line, line, range(width))
                b.store(short, b.address(target, at * self.width, self.lane))

        b.repeat(self.n, self.width, panel)

    @property
    def element_is_lane(self) -> bool:
        return LLVM_TYPES[self.element] == self.lane


def copy_pointers(b: Builder, pointers: V, count: int, packed: V) -> None:
    """An operand that is read from its own memory is packed as the addresses of its rows."""
    size, false = V(str(count * BYTES["ptr"]), "i64"), V("0", "i1")
    b.intrinsic("llvm.memcpy", "void", packed, pointers, size, false, overloads=("ptr", "ptr", "i64"))


def pointer_bytes(count: int) -> int:
    return -(-count * BYTES["ptr"] // 64) * 64
