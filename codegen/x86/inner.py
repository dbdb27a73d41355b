"""tl.dot with k along the lanes: both operands have k contiguous, and B is read from its own memory.

Rows of B come from memory once, a few before all rows of A have passed them. Rows of A are packed in the order in which
they are read, and those without a reader are left out. bfloats are multiplied in pairs where the level has that, and
widened elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.x86.builder import Builder, Index, V, constant, vector
from moecc.codegen.x86.dot_shape import Rows, call, define, each_block
from moecc.codegen.x86.fma import VectorPlan, multiply_add
from moecc.codegen.x86.fma_pack import copy_pointers, pointer_bytes
from moecc.codegen.x86.pack import row_pointers, transpose, widen, widen_halves
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

HEAD_LINES = 4
"""Of a row to come: enough for the hardware's prefetcher to go on."""
STREAMS = 8
"""Rows of B at a time: what stays in the caches while all rows of A pass."""


@dataclass(frozen=True, kw_only=True)
class InnerPlan(VectorPlan):
    """Both operands with k contiguous."""

    @property
    def rows(self) -> int:
        """Rows of A in one block."""
        return min(self.shape.m, 6 if self.pairs else 4)

    @property
    def streams(self) -> int:
        """Rows of B that one block of A's rows, or several, pass by."""
        return min(self.shape.n, STREAMS)

    def streams_beside(self, rows: int) -> int:
        """Of those, as many as sums stay in registers for."""
        return min(self.streams, 1 << (self.sums // rows).bit_length() - 1)

    @property
    def apart(self) -> int:
        """Distance of the rows of B that stand beside each other. Each is followed by the next in memory: long streams,
        which hardware foresees; rows shorter than a page would be many short ones."""
        spread = self.shape.n >= STREAMS * STREAMS and not self.shape.rounds
        return self.shape.n // STREAMS if spread else 1

    @property
    def plain(self) -> bool:
        return super().plain and self.apart == 1

    @property
    def skips_rows(self) -> bool:
        return self.shape.m > 1

    @property
    def halves(self) -> bool:
        """Whether bfloats are split into their even and odd elements, which costs less than to widen in order."""
        return self.shape.a == self.shape.b == "bf16" and self.shape.lane == "float" and self.shape.k > 1

    @property
    def step(self) -> int:
        """Elements of k at a time."""
        return min(self.shape.k, self.lanes * (2 if self.halves else 1))

    @property
    def sum_lanes(self) -> int:
        """Of a vector of sums; a lane adds up pairs or both halves."""
        return self.step // (2 if self.halves else 1)

    @property
    def zero_sums(self) -> V:
        return constant(0, self.shape.lane, self.sum_lanes)

    @property
    def packed_lane(self) -> str:
        return "i32" if self.pairs else self.shape.lane

    @property
    def packed_parts(self) -> int:
        """Vectors that hold a row's elements of one step: its pairs, or the even ones and the odd ones."""
        return 2 if self.halves and not self.pairs else 1

    @property
    def row_lanes(self) -> int:
        """Lanes of a packed row."""
        return self.shape.k // self.step * self.packed_parts * self.sum_lanes

    @property
    def a_bytes(self) -> int:
        return -(-self.shape.m // self.rows) * self.rows * self.row_lanes * BYTES[self.packed_lane]

    @property
    def b_bytes(self) -> int:
        return pointer_bytes(self.shape.n)

    def pack_a(self, b: Builder, rows: Rows, packed: V) -> None:
        """Block by block, and in a block step by step of k, the rows of each side by side: as products read them."""
        parameters = [V("%pointers", "ptr"), V("%packed", "ptr"), V("%rows", "i64")]
        used = constant(self.shape.m, "i64") if rows.used is None else rows.used
        name = f"inner.pack.{self.shape.name}"
        define(b.module, name, parameters, lambda c: self._pack_a(c, *parameters))
        call(b, name, rows.pointers, packed, used)

    def _pack_a(self, b: Builder, pointers: V, packed: V, rows: V) -> None:
        def row(index: V, _: list[V]) -> tuple[()]:
            (source,) = row_pointers(b, pointers, index, self.shape.m, 1)
            within = b.remainder(index, self.rows)
            start = self.packed_block(b, packed, b.multiply(b.divide(index, self.rows), self.rows))
            b.repeat(self.shape.k, self.step, lambda k: piece(source, start, within, k))
            return ()

        def piece(source: V, start: V, within: Index, k: Index) -> None:
            for part, value in enumerate(self.vectors(b, source, k, self.shape.a)):
                b.store(value, self._place(b, start, k, within, part))

        b.loop(0, rows, 1, row)

    def packed_block(self, b: Builder, packed: V, row: Index) -> V:
        """Where the block that begins with this row lies."""
        return b.address(packed, b.multiply(row, self.row_lanes), self.packed_lane)

    def _place(self, b: Builder, block: V, k: Index, row: Index, part: int) -> V:
        """Of a vector of the packed block."""
        steps = b.multiply(b.divide(k, self.step), self.rows)
        vectors = b.add(b.multiply(b.add(steps, row), self.packed_parts), part)
        return b.address(block, b.multiply(vectors, self.sum_lanes), self.packed_lane)

    def packed_vectors(self, b: Builder, block: V, k: Index, count: int) -> list[list[V]]:
        """A step's vectors of the first rows of a packed block."""
        type_ = vector(self.sum_lanes, self.packed_lane)
        return [
            [b.load(type_, self._place(b, block, k, row, part)) for part in range(self.packed_parts)]
            for row in range(count)
        ]

    def vectors(self, b: Builder, row: V, k: Index, element: str) -> list[V]:
        """The step's elements of a row as lanes."""
        place = b.address(row, k, LLVM_TYPES[element])
        if self.pairs:
            return [b.load(vector(self.lanes, "i32"), place, align=2)]
        if self.halves:
            return widen_halves(b, place, self.step // 2)
        return [widen(b, place, self.step, element, self.shape.lane)]

    def pack_b(self, b: Builder, rows: Rows, packed: V) -> None:
        copy_pointers(b, rows.pointers, rows.count, packed)

    def add_product(
        self, b: Builder, packed_a: V, packed_b: V, accumulator: V, used: V | None = None
    ) -> None:
        buffers = V("%a", "ptr"), V("%b", "ptr"), V("%sums", "ptr")
        name, arguments = f"inner.{self.shape.name}", [packed_a, packed_b, accumulator]
        if used is None:
            define(b.module, name, buffers, lambda c: _inner(c, self, buffers, self.shape.m))
            call(b, name, *arguments)
        else:
            rows = V("%rows", "i64")
            define(b.module, f"{name}.some", [*buffers, rows], lambda c: _inner(c, self, buffers, rows))
            call(b, f"{name}.some", *arguments, used)

    def to_rows(self, b: Builder, accumulator: V, rows: V) -> None:
        if self.apart == 1:
            super().to_rows(b, accumulator, rows)
        else:
            self._exchange(b, "to", accumulator, rows, self.shape.n // self.apart, self.apart)

    def from_rows(self, b: Builder, rows: V, accumulator: V) -> None:
        if self.apart == 1:
            super().from_rows(b, rows, accumulator)
        else:
            self._exchange(b, "from", rows, accumulator, self.apart, self.shape.n // self.apart)

    def _exchange(self, b: Builder, way: str, source: V, target: V, width: int, height: int) -> None:
        """Every line of `source`, [height, width], becomes [width, height] in `target`, in squares."""
        lane, square = self.shape.lane, STREAMS
        from_, to = V("%from", "ptr"), V("%to", "ptr")

        def body(c: Builder, line: Index, i: Index, j: Index) -> None:
            start = c.multiply(line, width * height)
            first = c.add(start, c.add(c.multiply(i, width), j))
            lines = [c.address(from_, c.add(first, row * width), lane) for row in range(square)]
            into = c.add(start, c.add(c.multiply(j, height), i))
            for column, value in enumerate(transpose(c, lines, lane)):
                c.store(value, c.address(to, c.add(into, column * height), lane))

        def emit(c: Builder) -> None:
            c.repeat(
                self.shape.m,
                1,
                lambda line: c.repeat(
                    height,
                    square,
                    lambda i: c.repeat(width, square, lambda j: body(c, line, i, j)),
                ),
            )

        name = f"inner.{way}.{self.shape.name}"
        define(b.module, name, [from_, to], emit)
        call(b, name, source, target)


def _inner(b: Builder, plan: InnerPlan, buffers: tuple[V, V, V], rows: Index) -> None:
    """A few rows of B at a time pass all rows of A: by the first of them they come from memory, then from the cache."""
    block = _Block(b, plan, *buffers)

    def few() -> None:
        b.repeat(plan.shape.n, plan.streams, once)

    def once(place: Index) -> None:
        block.foresee(place)
        block.of_rows(place, plan.streams, 0, rows)

    def many() -> None:
        b.repeat(plan.shape.n, plan.streams_beside(plan.rows), in_parts)

    def in_parts(place: Index) -> None:
        """Memory is read ahead while the second rows of A multiply, which need none of it."""
        width, second = plan.streams_beside(plan.rows), _at_most(b, rows, 2 * plan.rows)
        block.of_rows(place, width, 0, plan.rows)
        block.of_rows(place, width, plan.rows, second, ahead=True)
        block.of_rows(place, width, second, rows)

    if isinstance(rows, int):
        (few if rows <= plan.rows else many)()
    elif plan.shape.m <= plan.rows:
        few()
    else:
        b.choose(b.compare("icmp sle", rows, constant(plan.rows, "i64")), few, many)


def _at_most(b: Builder, count: Index, limit: int) -> Index:
    if isinstance(count, int):
        return min(count, limit)
    return b.intrinsic("llvm.smin", "i64", count, constant(limit, "i64"))


@dataclass(frozen=True)
class _Block:
    """Products of rows of A with `width` rows of B, added to their sums, which stand side by side from `place` on."""

    b: Builder
    plan: InnerPlan
    a: V
    pointers: V
    sums: V

    def of_rows(self, place: Index, width: int, first: Index, last: Index, *, ahead: bool = False) -> None:
        """`ahead`: the rows that follow in every stream are fetched meanwhile."""
        streams = self._streams(place, width)

        def block(row: Index, count: int) -> None:
            some = min(width, self.plan.streams_beside(count))
            for at in range(0, width, some):
                self._side_by_side(streams[at : at + some], self.b.add(place, at), row, count, ahead)

        each_block(self.b, first, last, self.plan.rows, block)

    def _streams(self, place: Index, width: int) -> list[V]:
        b, apart = self.b, self.plan.apart
        if apart == 1:
            return row_pointers(b, self.pointers, place, self.plan.shape.n, width)
        group = b.divide(place, self.plan.streams)
        first = b.multiply(b.remainder(place, self.plan.streams), apart)
        at = b.add(group, first)
        return [b.load("ptr", b.address(self.pointers, b.add(at, i * apart), "ptr")) for i in range(width)]

    def foresee(self, place: Index) -> None:
        """Begin the rows that follow in every stream: where a page ends, hardware foresees nothing."""
        line = 64 // BYTES[LLVM_TYPES[self.plan.shape.b]]
        for stream in self._streams(place, self.plan.streams):
            for i in range(HEAD_LINES):
                self._prefetch(stream, self.plan.shape.k + i * line)

    def _prefetch(self, stream: V, element: Index) -> None:
        to_read, into_second_cache, data = (constant(number, "i32") for number in (0, 2, 1))
        place = self.b.address(stream, element, LLVM_TYPES[self.plan.shape.b])
        self.b.intrinsic("llvm.prefetch", "void", place, to_read, into_second_cache, data, overloads=["ptr"])

    def _side_by_side(self, streams: list[V], place: Index, row: Index, count: int, ahead: bool) -> None:
        b, plan = self.b, self.plan
        start = plan.packed_block(b, self.a, row)

        def step(k: V, totals: list[V]) -> Sequence[V]:
            for stream in streams if ahead else ():
                self._prefetch(stream, b.add(k, plan.shape.k))
            columns = [plan.vectors(b, stream, k, plan.shape.b) for stream in streams]
            return _multiply_step(b, plan.packed_vectors(b, start, k, count), columns, totals)

        totals = b.loop(0, plan.shape.k, plan.step, step, [plan.zero_sums] * (len(streams) * count))
        for i in range(count):
            self._add_sums(totals[i * len(streams) : (i + 1) * len(streams)], b.add(row, i), place)

    def _add_sums(self, totals: list[V], row: Index, place: Index) -> None:
        """Add the sum of each vector's lanes to a number in memory."""
        b, shape = self.b, self.plan.shape
        target = b.address(self.sums, b.add(b.multiply(row, shape.n), place), shape.lane)
        line = b.load(vector(len(totals), shape.lane), target)
        b.store(b.op(_addition(shape.lane), line, sums_of_lanes(b, totals)), target)


def _multiply_step(b: Builder, numbers: list[list[V]], columns: list[list[V]], totals: list[V]) -> list[V]:
    """Totals by row of A, then by row of B, after one step of k."""
    following = list(totals)
    for i, row in enumerate(numbers):
        for j, column in enumerate(columns):
            place = i * len(columns) + j
            for x, y in zip(row, column, strict=True):
                following[place] = multiply_add(b, x, y, following[place])
    return following


def sums_of_lanes(b: Builder, totals: list[V]) -> V:
    """The sum of each vector's lanes, side by side: two vectors become one, each a half of its lanes, until one is left
    with a group of lanes for each."""
    width = totals[0].lanes
    while len(totals) > 1 or width > 1:
        pairs = list(zip(totals[::2], totals[1::2] or totals, strict=True))
        if width > 1:
            totals, width = [_sum_of_halves(b, pair, width) for pair in pairs], width // 2
        else:
            totals = [b.shuffle(x, y, range(2 * x.lanes)) for x, y in pairs]
    return totals[0]


def _sum_of_halves(b: Builder, pair: tuple[V, V], width: int) -> V:
    """Every group of `width` lanes of both vectors (of one, where they are the same) becomes one half as wide."""
    x, y = pair
    lanes = x.lanes if x is y else 2 * x.lanes
    low, high = (
        b.shuffle(
            x, y, [group + at for group in range(0, lanes, width) for at in range(first, first + width // 2)]
        )
        for first in (0, width // 2)
    )
    return b.op(_addition(low.lane_type), low, high)


def _addition(lane: str) -> str:
    return "add" if lane == "i32" else "fadd"
