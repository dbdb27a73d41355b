"""Reductions along any axis with any combiner: vectors of partial results, folded at the end."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from moecc.codegen.x86.builder import Builder, Index, V
from moecc.codegen.x86.elementwise import ELEMENTWISE, lower_elementwise
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.evaluate import evaluate_vector, lane_extents, store_window
from moecc.codegen.x86.function import parse_constant
from moecc.codegen.x86.lanes import Window, row_major
from moecc.codegen.x86.steps import splat_text
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Op, Value

ABREAST = 4
"""Windows that are combined among themselves before they join the partial result: independent chains of work."""


def combine(frame: Frame, op: Op, left: Sequence[V], right: Sequence[V]) -> list[V]:
    """The combiner of a reduction or scan on every lane; left elements come before right ones."""
    b, body = frame.b, op.body()
    lanes = left[0].lanes
    known = dict(zip(body.arguments, [*left, *right], strict=True))

    def value_of(value: Value) -> V:
        return known[value] if value in known else b.splat(frame.scalars[value], lanes)

    for inner in body.ops[:-1]:
        if inner.name == "arith.constant":
            text = splat_text(inner)
            assert text is not None
            known[inner.result] = b.splat(parse_constant(text, inner.result.type), lanes)
        elif inner.name in ELEMENTWISE:
            known[inner.result] = lower_elementwise(
                b, inner, [value_of(operand) for operand in inner.operands]
            )
        else:
            raise UnsupportedError(f"op {inner.name} in a combiner", hint="use arithmetic and tl.where").at(
                inner.location
            )
    return [value_of(value) for value in body.terminator.operands]


def fold(frame: Frame, op: Op, items: Sequence[V], extent: Sequence[int], axis: int) -> list[V]:
    """Lanes over a block of these extents, reduced along axis to extent 1 there, in the order of the lanes."""
    items, extents = list(items), list(extent)
    while extents[axis] > 1:
        half = extents[axis] // 2
        strides = row_major(extents)
        extents[axis] = half
        low = Window((0,) * len(extents), tuple(extents)).offsets(strides)
        high = [pick + half * strides[axis] for pick in low]
        items = combine(frame, op, _picked(frame.b, items, low), _picked(frame.b, items, high))
    return items


def _picked(b: Builder, items: Sequence[V], picks: Sequence[int]) -> list[V]:
    if len(picks) == 1:
        return [b.extract(item, picks[0]) for item in items]
    return [b.shuffle(item, item, picks) for item in items]


def _reduce(frame: Frame, op: Op) -> None:
    shape, axis = op.operands[0].type.dims, op.integer("axis")
    extents = reduction_extents(shape, axis, frame.level.lanes)
    tiles = {result: frame.new_tile(result.type) for result in op.results if result.type.is_tensor}
    frame.tiles.update(tiles)

    def at(base: tuple[Index, ...]) -> None:
        items = _along(frame, op, Window(base, tuple(extents)), axis)
        for result, item in zip(op.results, items, strict=True):
            if result.type.is_tensor:
                outer = Window(base, tuple(extents)).drop(axis)
                store_window(frame, tiles[result], outer, item)
            else:
                frame.scalars[result] = item

    def visit(dim: int, base: tuple[Index, ...]) -> None:
        if dim == len(shape):
            at(base)
        elif dim == axis:
            visit(dim + 1, (*base, 0))
        else:
            frame.b.repeat(shape[dim], extents[dim], lambda i: visit(dim + 1, (*base, i)))

    visit(0, ())


def reduction_extents(shape: Sequence[int], axis: int, lanes: int) -> list[int]:
    """Lanes run over the dimensions behind the axis if they fill a vector: partial results then need no folding."""
    if prod(shape[axis + 1 :]) >= lanes:
        rest = lane_extents((*shape[:axis], 1, *shape[axis + 1 :]), lanes)
        return rest
    return lane_extents(shape, lanes, None if axis == len(shape) - 1 or prod(shape) <= lanes else axis)


def _along(frame: Frame, op: Op, first: Window, axis: int) -> list[V]:
    """All windows along the axis from the first one on, reduced; lanes of the other dimensions are kept."""
    b, size, step = frame.b, op.operands[0].type.dims[axis], first.extent[axis]
    count = size // step
    abreast = min(count, ABREAST)

    def group(start: Index) -> list[V]:
        found = []
        for i in range(abreast):
            window = first.replace(axis, b.add(start, i * step), step)
            with frame.scope():
                found.append([evaluate_vector(frame, operand, window) for operand in op.operands])
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [combine(frame, op, left, right) for left, right in pairs]
        return found[0]

    items = group(0)
    if count > abreast:
        items = b.loop(
            abreast * step,
            size,
            abreast * step,
            lambda i, partial: combine(frame, op, partial, group(i)),
            items,
        )
    return fold(frame, op, items, first.extent, axis)


RULES: dict[str, Rule] = {"tt.reduce": _reduce}
