"""Reductions along any axis with any combiner: vectors of partial results, folded at the end."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from moecc.codegen.x86.builder import Builder, Index, V
from moecc.codegen.x86.elementwise import ELEMENTWISE, lower_elementwise
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.evaluate import blocks, evaluate_vector, lane_extents, store_window
from moecc.codegen.x86.function import parse_constant
from moecc.codegen.x86.lanes import Window, row_major
from moecc.codegen.x86.steps import splat_text
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Block, Op, Value

ABREAST = 4
"""Windows that are combined among themselves before they join the partial result: independent chains of work."""


def combine(frame: Frame, op: Op, left: Sequence[V], right: Sequence[V]) -> list[V]:
    """The combiner of a reduction or scan on every lane; left elements come before right ones."""
    b, body = frame.b, _combiner(op)
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


def _combiner(op: Op) -> Block:
    if len(op.regions[0]) > 1:
        raise UnsupportedError("a branch in a combiner", hint="use tl.where").at(op.location)
    return op.body()


def fold(
    frame: Frame, op: Op, items: Sequence[V], extent: Sequence[int], axis: int, *, ordered: bool
) -> list[V]:
    """Lanes over a block of these extents, reduced along axis to extent 1 there: by halves, or by neighbours if the
    order matters."""
    items, extents = list(items), list(extent)
    while extents[axis] > 1:
        strides = row_major(extents)
        extents[axis] //= 2
        stride = strides[axis]
        strides[axis] *= 1 + ordered
        low = Window((0,) * len(extents), tuple(extents)).offsets(strides)
        high = [pick + (stride if ordered else extents[axis] * stride) for pick in low]
        items = combine(frame, op, _picked(frame.b, items, low), _picked(frame.b, items, high))
    return items


def _merge(
    frame: Frame, op: Op, left: Sequence[V], right: Sequence[V], extent: Sequence[int], axis: int
) -> list[V]:
    """Two blocks that follow each other along axis, reduced to one: every lane has two neighbours of before."""
    size, stride = extent[axis], prod(extent[axis + 1 :])
    low = []
    for lane in range(prod(extent)):
        index = lane // stride % size
        block, at = divmod(2 * index, size)
        low.append(lane + (at - index) * stride + block * prod(extent))
    high = [pick + stride for pick in low]
    pairs = list(zip(left, right, strict=True))
    return combine(frame, op, *([frame.b.shuffle(a, c, picks) for a, c in pairs] for picks in (low, high)))


_COMMUTATIVE = {f"arith.{name}" for name in ("addi", "addf", "muli", "mulf", "andi", "ori", "xori")} | {
    f"arith.{which}{kind}" for which in ("max", "min") for kind in ("si", "ui", "numf", "imumf")
}


def _order_matters(op: Op) -> bool:
    """Unless every result is one op that is known to commute, on its own pair of elements."""
    body, count = _combiner(op), len(op.results)
    pairs = list(zip(body.arguments[:count], body.arguments[count:], strict=True))
    return not all(
        result.op and result.op.name in _COMMUTATIVE and set(result.op.operands) == set(pair)
        for result, pair in zip(body.terminator.operands, pairs, strict=True)
    )


def _picked(b: Builder, items: Sequence[V], picks: Sequence[int]) -> list[V]:
    if len(picks) == 1:
        return [b.extract(item, picks[0]) for item in items]
    return [b.shuffle(item, item, picks) for item in items]


def _reduce(frame: Frame, op: Op) -> None:
    shape, axis = op.operands[0].type.dims, op.integer("axis")
    extents = reduction_extents(shape, axis, frame.level.lanes)
    tiles = {result: frame.new_tile(result.type) for result in op.results if result.type.is_tensor}
    frame.tiles.update(tiles)

    def at(window: Window) -> None:
        items = _along(frame, op, window, axis)
        for result, item in zip(op.results, items, strict=True):
            if result.type.is_tensor:
                store_window(frame, tiles[result], window.drop(axis), item)
            else:
                frame.scalars[result] = item

    blocks(frame, [*shape[:axis], extents[axis], *shape[axis + 1 :]], extents, at)


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
    ordered = step > 1 and _order_matters(op)

    def group(start: Index) -> list[V]:
        found = []
        for i in range(abreast):
            window = first.replace(axis, b.add(start, i * step), step)
            with frame.scope():
                found.append([evaluate_vector(frame, operand, window) for operand in op.operands])
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [together(left, right) for left, right in pairs]
        return fold(frame, op, found[0], first.extent, axis, ordered=True) if ordered else found[0]

    def together(left: list[V], right: list[V]) -> list[V]:
        if ordered:
            return _merge(frame, op, left, right, first.extent, axis)
        return combine(frame, op, left, right)

    items = group(0)
    if count > abreast:
        items = b.loop(
            abreast * step,
            size,
            abreast * step,
            lambda i, partial: combine(frame, op, partial, group(i)),
            items,
        )
    return items if ordered else fold(frame, op, items, first.extent, axis, ordered=False)


RULES: dict[str, Rule] = {"tt.reduce": _reduce}
