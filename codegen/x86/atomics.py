"""Atomic ops, element by element in the order of a tile: a loop, however large the tile is.

What an element held before is the result; it is zero where a mask keeps the element out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moecc.codegen.x86.builder import Builder, Index, V, constant
from moecc.codegen.x86.evaluate import blocks, evaluate_vector, lane_extents
from moecc.codegen.x86.float_formats import from_single, to_single
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.steps import constant_of
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Op, Value
from moecc.codegen.x86.types import BYTES

_KINDS = ("", "and", "or", "xor", "add", "fadd", "max", "min", "umax", "umin", "xchg")
"""LLVM's names, in the order of the attribute `atomic_rmw_op`."""

_ORDERINGS = ("", "monotonic", "acquire", "release", "acq_rel")
"""LLVM's names, in the order of the attribute `sem`."""

_INTEGERS = {"half": "i16", "float": "i32", "double": "i64"}


def _modify(frame: Frame, op: Op) -> None:
    masks = [mask for mask in op.operands[2:] if constant_of(mask) != 1]
    lane = op.result.type.llvm
    kind, order = _KINDS[op.integer("atomic_rmw_op")], _ORDERINGS[op.integer("sem")]

    def one(pointer: V, item: V, *mask: V) -> V:
        def change() -> Sequence[V]:
            return [_modify_one(frame.b, kind, pointer, item, order, op.operands[1].type.element)]

        if not mask:
            return change()[0]
        zero = V("null", lane) if lane == "ptr" else constant(0, lane)
        return frame.b.choose(mask[0], change, lambda: [zero])[0]

    _each(frame, op, [*op.operands[:2], *masks], one)


def _modify_one(b: Builder, kind: str, pointer: V, item: V, order: str, element: str) -> V:
    if kind == "fadd" and element in ("f16", "bf16"):
        return _add_short(b, pointer, item, order, element)
    if kind == "xchg" and item.type == "half":
        bits = b.cast("bitcast", item, "i16")
        return b.cast("bitcast", _modify_one(b, kind, pointer, bits, order, element), item.type)
    align = BYTES[item.type]
    return b.emit(f"atomicrmw {kind} {pointer.typed}, {item.typed} {order}, align {align}", item.type)


def _add_short(b: Builder, pointer: V, item: V, order: str, element: str) -> V:
    """A sum in f32, rounded to 16 bits, put where nothing has changed meanwhile."""
    first = b.emit(f"load atomic i16, {pointer.typed} monotonic, align 2", "i16")
    before, again, after = b.current, b.label(), b.label()
    b.branch(again)
    b.start(again)
    seen, found = V(b.fresh(), "i16"), V(b.fresh(), "i16")
    b.run(f"{seen} = phi i16 [ {first}, %{before} ], [ {found}, %{again} ]")
    wide = b.op(
        "fadd", to_single(b, b.cast("bitcast", seen, item.type), element), to_single(b, item, element)
    )
    total = b.cast("bitcast", from_single(b, wide, element), "i16")
    pair = _exchange_if(b, pointer, seen, total, order)
    b.run(f"{found} = extractvalue {pair.typed}, 0")
    done = b.emit(f"extractvalue {pair.typed}, 1", "i1")
    b.run(f"br {done.typed}, label %{after}, label %{again}")
    b.start(after)
    return b.cast("bitcast", found, item.type)


def _exchange_if(b: Builder, pointer: V, expected: V, item: V, order: str) -> V:
    """(what was there, whether it was what is expected)"""
    failure = {"release": "monotonic", "acq_rel": "acquire"}.get(order, order)
    align = BYTES[item.type]
    operands = f"{pointer.typed}, {expected.typed}, {item.typed} {order} {failure}, align {align}"
    return b.emit(f"cmpxchg {operands}", f"{{ {item.type}, i1 }}")


def _compare(frame: Frame, op: Op) -> None:
    """Floats are compared by their bits."""
    b, order = frame.b, _ORDERINGS[op.integer("sem")]

    def one(pointer: V, expected: V, item: V) -> V:
        bits = _as_integer(b, item)
        pair = _exchange_if(b, pointer, _as_integer(b, expected), bits, order)
        found = b.emit(f"extractvalue {pair.typed}, 0", bits.type)
        return b.cast("bitcast", found, item.type)

    _each(frame, op, op.operands, one)


def _as_integer(b: Builder, value: V) -> V:
    return b.cast("bitcast", value, _INTEGERS.get(value.type, value.type))


def _each(frame: Frame, op: Op, operands: Sequence[Value], one: Callable[..., V]) -> None:
    """one(*elements) for every element, whose results are the op's."""
    b, result = frame.b, op.result
    if not result.type.is_tensor:
        frame.scalars[result] = one(*(frame.scalars[operand] for operand in operands))
        return
    old = frame.new_tile(result.type) if result.users else None
    rows = [frame.allocate(operand.type.llvm, frame.level.lanes) for operand in operands]

    def some(window: Window) -> None:
        items = [evaluate_vector(frame, operand, window) for operand in operands]
        for row, item in zip(rows, items, strict=True):
            b.store(item, row)
        base = b.dot_index(window.base, old.strides) if old else 0

        def element(lane: Index) -> None:
            parts = [
                b.load(item.lane_type, b.address(row, lane, item.lane_type))
                for row, item in zip(rows, items, strict=True)
            ]
            before = one(*parts)
            if old:
                b.store(before, b.address(old.buffer, b.add(base, lane), before.type))

        b.repeat(window.lanes, 1, element)

    shape = result.type.dims
    blocks(frame, shape, lane_extents(shape, frame.level.lanes), some)
    if old:
        frame.tiles[result] = old


RULES: dict[str, Rule] = {"tt.atomic_rmw": _modify, "tt.atomic_cas": _compare}
