"""The value of a tile at a window, and loops over the windows of a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

from moecc.codegen.x86.builder import Index, V, constants, like, vector
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.lanes import Lanes, LaneValue, Ramp, Uniform, Window, as_vector, row_major
from moecc.codegen.x86.steps import step
from moecc.codegen.x86.tiles import Accumulating, Frame, Shifted, Stored
from moecc.codegen.x86.tree import Value
from moecc.codegen.x86.types import BYTES, memory_type, pointee

UNROLLED = 4
"""A tile of at most so many windows is looked at without a loop, so that LLVM keeps its buffers in registers."""

NESTED = 3
"""Loops in each other at most: those of a tile of many small dimensions would cost more than their rounds."""


def evaluate(frame: Frame, value: Value, window: Window) -> LaneValue:
    """Of a scalar the same at any window."""
    if not value.type.is_tensor:
        return Uniform(frame.scalars[value])
    key = value, window
    if key not in frame.memo:
        frame.memo[key] = _evaluate(frame, value, window)
    return frame.memo[key]


def evaluate_vector(frame: Frame, value: Value, window: Window) -> V:
    """As a vector of the window's lanes; a scalar for a window of one."""
    return as_vector(frame.b, evaluate(frame, value, window), window.lanes)


def _evaluate(frame: Frame, value: Value, window: Window) -> LaneValue:
    tile = frame.tiles[value]
    if isinstance(tile, Stored):
        return load_window(frame, tile, window)
    if isinstance(tile, Shifted):
        return _shifted(frame, tile, evaluate(frame, tile.initial, window), value)
    assert not isinstance(tile, Accumulating), f"{value} is read before its loop has ended"
    rule = frame.inline.get(tile.op.name)
    if rule is None:
        raise UnsupportedError(f"op {tile.op.name}").at(tile.op.location)
    try:
        return rule(frame, tile.op, window, value)
    except UnsupportedError as error:
        raise error.at(tile.op.location) from None


def _shifted(frame: Frame, tile: Shifted, initial: LaneValue, value: Value) -> LaneValue:
    b, lane = frame.b, value.type.pointee and pointee_lane(value)

    def moved(item: V) -> V:
        if lane:
            return b.emit(f"getelementptr {lane}, {item.typed}, {tile.offset.typed}", item.type)
        return b.op("add", item, b.splat(tile.offset, item.lanes))

    if isinstance(initial, Uniform):
        return Uniform(moved(initial.value))
    if isinstance(initial, Lanes):
        return Lanes(moved(initial.value))
    exact = initial.exact
    return Ramp(
        moved(initial.base),
        initial.step,
        initial.pointee,
        initial.guards,
        None if exact is None else lambda: moved(exact()),
    )


def pointee_lane(value: Value) -> str:
    """LLVM's type of one element that a pointer points to, as it is in memory."""
    return memory_type(pointee(value.type).llvm)


def load_window(frame: Frame, tile: Stored, window: Window) -> LaneValue:
    b, lane = frame.b, tile.type.llvm
    start = b.address(tile.buffer, b.dot_index(window.base, tile.strides), lane)
    offsets = window.offsets(tile.strides)
    if window.lanes == 1:
        return Uniform(b.load(lane, start))
    if offsets == list(range(window.lanes)):
        return Lanes(b.load(vector(window.lanes, lane), start))
    return Lanes(gather_elements(frame, start, constants(offsets, "i64"), lane))


def gather_elements(frame: Frame, start: V, offsets: V, lane: str) -> V:
    """start[offsets], from memory of our own."""
    b, count, held = frame.b, offsets.lanes, memory_type(lane)
    pointers = b.emit(f"getelementptr {held}, {start.typed}, {offsets.typed}", like(offsets, "ptr"))
    if not count:
        return b.load(lane, pointers)
    everyone = V("splat (i1 true)", vector(count, "i1"))
    type_ = vector(count, held)
    gathered = b.intrinsic(
        "llvm.masked.gather",
        type_,
        pointers,
        V(str(BYTES[lane]), "i32"),
        everyone,
        V("poison", type_),
        overloads=[type_, pointers.type],
    )
    return b.cast("trunc", gathered, "i1") if lane == "i1" else gathered


def store_window(frame: Frame, tile: Stored, window: Window, item: V) -> None:
    """The lanes of a window that is contiguous in the tile, or of a single element."""
    b, lane = frame.b, tile.type.llvm
    start = b.address(tile.buffer, b.dot_index(window.base, tile.strides), lane)
    offsets = window.offsets(tile.strides)
    if offsets == list(range(window.lanes)):
        b.store(item, start)
        return
    for number, offset in enumerate(offsets):
        b.store(b.extract(item, number), b.address(start, offset, lane))


def windows(
    frame: Frame,
    shape: Sequence[int],
    body: Callable[[Window], None],
    *,
    along: int | None = None,
    lanes: int | None = None,
) -> None:
    """body at every window of a tile; lanes run along that dimension, by default over the last ones."""
    extents = lane_extents(shape, lanes or frame.level.lanes, along)
    blocks(frame, shape, extents, body, unrolled=UNROLLED)


def blocks(
    frame: Frame,
    shape: Sequence[int],
    extents: Sequence[int],
    body: Callable[[Window], None],
    *,
    unrolled: int = 1,
) -> None:
    """body at every window of these extents; at most `unrolled` of the last ones stand side by side."""
    counts = [size // extent for size, extent in zip(shape, extents, strict=True)]
    split, total = len(shape), 1
    while split and total * counts[split - 1] <= unrolled:
        split -= 1
        total *= counts[split]

    def inner(outer: Sequence[Index]) -> None:
        for place in product(*(range(count) for count in counts[split:])):
            base = (*outer, *(i * extent for i, extent in zip(place, extents[split:], strict=True)))
            with frame.scope():
                body(Window(base, tuple(extents)))

    _nest(frame, counts[:split], extents[:split], inner)


def _nest(
    frame: Frame, counts: Sequence[int], extents: Sequence[int], body: Callable[[Sequence[Index]], None]
) -> None:
    """Loops over so many blocks along every dimension; a single one, that numbers them, where they would be deep."""
    b = frame.b
    if sum(count > 1 for count in counts) > NESTED:
        strides = row_major(counts)

        def numbered(number: Index) -> None:
            body(
                [
                    b.multiply(b.remainder(b.divide(number, stride), count), extent)
                    for stride, count, extent in zip(strides, counts, extents, strict=True)
                ]
            )

        b.repeat(prod(counts), 1, numbered)
        return

    def visit(base: tuple[Index, ...]) -> None:
        dim = len(base)
        if dim == len(counts):
            body(base)
        else:
            b.repeat(counts[dim] * extents[dim], extents[dim], lambda i: visit((*base, i)))

    visit(())


def lane_extents(shape: Sequence[int], lanes: int, along: int | None = None) -> list[int]:
    """How many lanes run along each dimension: along one of them, or over as many of the last as needed."""
    extents = [1] * len(shape)
    for dim in reversed(range(len(shape))) if along is None else [along]:
        extents[dim] = min(shape[dim], lanes)
        lanes //= extents[dim]
        if shape[dim] > extents[dim]:
            break
    return extents


def write_tile(frame: Frame, value: Value, tile: Stored) -> None:
    """Evaluate every element of value into the tile's buffer."""
    windows(
        frame,
        value.type.dims,
        lambda window: store_window(frame, tile, window, evaluate_vector(frame, value, window)),
    )


def stored(frame: Frame, value: Value) -> Stored:
    """The value in memory, which it is put into if it is not there."""
    tile = frame.tiles[value]
    if isinstance(tile, Stored):
        return tile
    tile = frame.new_tile(value.type)
    write_tile(frame, value, tile)
    return tile


def fastest_dim(pointers: Value) -> int | None:
    """The dimension along which addresses are contiguous, None if the last one will do."""
    dims = pointers.type.dims
    for dim in reversed(range(len(dims))):
        if dims[dim] > 1 and step(pointers, dim) == 1:
            return None if dim == len(dims) - 1 else dim
    return None
