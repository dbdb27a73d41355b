"""Scans along any axis with any combiner: in log steps within a window, by a carry from window to window."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from moecc.codegen.x86.builder import Index, V
from moecc.codegen.x86.evaluate import blocks, evaluate_vector, lane_extents, store_window
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.reduce import combine
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Op


def _scan(frame: Frame, op: Op) -> None:
    """A reversed scan starts at the last element, which is then the left operand of the combiner."""
    shape, axis = list(op.result.type.dims), op.integer("axis")
    size, reverse = shape[axis], op.attributes.get("reverse") is True
    fits = prod(shape[axis + 1 :]) < frame.level.lanes
    extents = lane_extents(shape if fits else [*shape[:axis], 1, *shape[axis + 1 :]], frame.level.lanes)
    step = extents[axis]
    tiles = [frame.new_tile(result.type) for result in op.results]

    def one(window: Window, place: Index, carry: Sequence[V]) -> list[V]:
        """The elements `place` steps from the start; `carry` has all before, at every place along the axis."""
        base = place if not reverse else frame.b.add(size - step, frame.b.multiply(place, -1))
        window = window.replace(axis, base, step)
        with frame.scope():
            items = [evaluate_vector(frame, operand, window) for operand in op.operands]
            items = _within(frame, op, items, window.extent, axis, reverse)
            if carry:
                items = combine(frame, op, carry, items)
            for tile, item in zip(tiles, items, strict=True):
                store_window(frame, tile, window, item)
        return _last(frame, items, window.extent, axis, reverse)

    def along(window: Window) -> None:
        carry = one(window, 0, ())
        if size > step:
            frame.b.loop(step, size, step, lambda place, before: one(window, place, before), carry)

    blocks(frame, [*shape[:axis], step, *shape[axis + 1 :]], extents, along)
    frame.tiles.update(zip(op.results, tiles, strict=True))


def _along_axis(extent: Sequence[int], axis: int) -> list[tuple[int, int]]:
    """Of every lane its index along the axis, and how many lanes a step along it is."""
    stride = prod(extent[axis + 1 :])
    return [(lane // stride % extent[axis], stride) for lane in range(prod(extent))]


def _within(frame: Frame, op: Op, items: list[V], extent: Sequence[int], axis: int, reverse: bool) -> list[V]:
    """Every lane combined with those before it; in each step with as many as the distance says."""
    b, size, distance = frame.b, extent[axis], 1
    while distance < size:
        sources, chosen = [], []
        for lane, (index, stride) in enumerate(_along_axis(extent, axis)):
            before = index + distance if reverse else index - distance
            inside = 0 <= before < size
            sources.append(lane + (before - index) * stride if inside else lane)
            chosen.append(lane + prod(extent) if inside else lane)
        combined = combine(frame, op, [b.shuffle(item, item, sources) for item in items], items)
        items = [b.shuffle(item, other, chosen) for item, other in zip(items, combined, strict=True)]
        distance *= 2
    return items


def _last(frame: Frame, items: list[V], extent: Sequence[int], axis: int, reverse: bool) -> list[V]:
    """What the lane at the end of the axis holds, in every lane along it."""
    if extent[axis] == 1:
        return items
    end = 0 if reverse else extent[axis] - 1
    picks = [lane + (end - index) * stride for lane, (index, stride) in enumerate(_along_axis(extent, axis))]
    return [frame.b.shuffle(item, item, picks) for item in items]


RULES: dict[str, Rule] = {"tt.scan": _scan}
