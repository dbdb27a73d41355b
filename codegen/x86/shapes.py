"""Ops that only say where an element comes from, and integer arithmetic that keeps lanes evenly spaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moecc.codegen.x86.builder import V, constant
from moecc.codegen.x86.elementwise import ELEMENTWISE, lower_elementwise
from moecc.codegen.x86.evaluate import evaluate, evaluate_vector, pointee_lane
from moecc.codegen.x86.lanes import (
    Lanes,
    LaneValue,
    Ramp,
    Uniform,
    Window,
    as_vector,
    permute,
    row_major,
)
from moecc.codegen.x86.steps import constant_of, range_of
from moecc.codegen.x86.tiles import Frame, InlineRule
from moecc.codegen.x86.tree import Op, Value


def _splat(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    return Uniform(frame.scalars[op.operands[0]])


def _range(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    b = frame.b
    first = b.add(window.base[0], op.integer("start"))
    base = constant(first, "i32") if isinstance(first, int) else b.cast("trunc", first, "i32")
    return Uniform(base) if window.lanes == 1 else Ramp(base, 1)


def _expand_dims(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    return evaluate(frame, op.operands[0], window.drop(op.integer("axis")))


def _broadcast(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    source = op.operands[0]
    inner = window
    for dim, size in enumerate(source.type.dims):
        if size == 1:
            inner = inner.replace(dim, 0, 1)
    found = evaluate(frame, source, inner)
    if inner.lanes == window.lanes or isinstance(found, Uniform):
        return found
    strides = [
        stride * (extent > 1) for stride, extent in zip(row_major(inner.extent), inner.extent, strict=True)
    ]
    vector = as_vector(frame.b, found, inner.lanes)
    return permute(frame.b, Lanes(vector), window.offsets(strides))


def _transpose(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    order = op.integers("order")
    base, extent = list(window.base), list(window.extent)
    for dim, source in enumerate(order):
        base[source], extent[source] = window.base[dim], window.extent[dim]
    inner = Window(tuple(base), tuple(extent))
    found = evaluate(frame, op.operands[0], inner)
    strides = row_major(inner.extent)
    picks = window.offsets([strides[source] for source in order])
    if isinstance(found, Uniform) or picks == list(range(window.lanes)):
        return found
    return permute(frame.b, Lanes(as_vector(frame.b, found, window.lanes)), picks)


def _reshape(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    source = op.operands[0]
    linear = frame.b.dot_index(window.base, row_major(value.type.dims))
    if window.offsets(row_major(value.type.dims)) == list(range(window.lanes)):
        return evaluate(frame, source, _linear_window(frame, linear, window.lanes, source.type.dims))
    return _assemble(frame, value, window)


def _linear_window(frame: Frame, linear: int | V, lanes: int, shape: Sequence[int]) -> Window:
    """The window of `lanes` elements from a row-major index on; lanes divide the index."""
    base, extent = [], []
    for size, stride in zip(shape, row_major(shape), strict=True):
        base.append(frame.b.remainder(frame.b.divide(linear, stride), size))
        extent.append(max(1, min(size, lanes // stride)))
    return Window(tuple(base), tuple(extent))


def _assemble(frame: Frame, value: Value, window: Window) -> LaneValue:
    """Lane by lane, for windows that are scattered in the source."""
    b, result = frame.b, None
    for number, offset in enumerate(window.offsets(row_major(value.type.dims))):
        base = b.add(b.dot_index(window.base, row_major(value.type.dims)), offset)
        item = evaluate_vector(frame, value, _linear_window(frame, base, 1, value.type.dims))
        result = V("poison", f"<{window.lanes} x {item.type}>") if result is None else result
        result = b.insert(result, item, number)
    assert result is not None
    return Lanes(result)


def _join(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    b, last = frame.b, len(window.base) - 1
    if window.extent[last] == 2:
        both = [evaluate_vector(frame, operand, window.drop(last)) for operand in op.operands]
        if not both[0].lanes:
            pair = b.insert(V("poison", f"<2 x {both[0].type}>"), both[0], 0)
            return Lanes(b.insert(pair, both[1], 1))
        half = window.lanes // 2
        return Lanes(b.shuffle(both[0], both[1], [i // 2 + half * (i % 2) for i in range(window.lanes)]))
    which = window.base[last]
    if isinstance(which, int):
        return evaluate(frame, op.operands[which], window.drop(last))
    first, second = (evaluate_vector(frame, operand, window.drop(last)) for operand in op.operands)
    chosen = b.select(b.compare("icmp eq", which, V("0", "i64")), first, second)
    return Lanes(chosen) if chosen.lanes else Uniform(chosen)


def _split(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    b, which = frame.b, op.results.index(value)
    both = evaluate_vector(frame, op.operands[0], window.insert(len(window.base), 0, 2))
    if window.lanes == 1:
        return Uniform(b.extract(both, which))
    return Lanes(b.shuffle(both, both, [2 * i + which for i in range(window.lanes)]))


def _add_pointer(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    pointer, offset = (evaluate(frame, operand, window) for operand in op.operands)
    b, lane, signed = frame.b, pointee_lane(value), op.operands[1]

    def moved(address: V, index: V) -> V:
        if address.lanes != index.lanes:
            count = max(address.lanes, index.lanes)
            address = address if address.lanes else b.splat(address, count)
            index = index if index.lanes else b.splat(index, count)
        return b.emit(f"getelementptr {lane}, {address.typed}, {index.typed}", address.type)

    if isinstance(pointer, Lanes) or isinstance(offset, Lanes):
        items = (as_vector(b, item, window.lanes) for item in (pointer, offset))
        return Lanes(moved(*items))
    if isinstance(pointer, Uniform) and isinstance(offset, Uniform):
        return Uniform(moved(pointer.value, offset.value))
    guards: tuple[V, ...] = ()
    step, base, index = 0, pointer, offset
    if isinstance(pointer, Ramp):
        step, guards = pointer.step, pointer.guards
    if isinstance(offset, Ramp):
        step += offset.step
        guards += offset.guards or _wrap_guards(frame, offset, window.lanes, signed)
    start = moved(_first(base), _first(index))
    if not guards:
        return Ramp(start, step, lane)

    def exact() -> V:
        return moved(as_vector(b, pointer, window.lanes), as_vector(b, offset, window.lanes))

    return Ramp(start, step, lane, guards, exact)


def _first(value: LaneValue) -> V:
    assert not isinstance(value, Lanes)
    return value.value if isinstance(value, Uniform) else value.base


def _wrap_guards(frame: Frame, ramp: Ramp, lanes: int, source: Value) -> tuple[V, ...]:
    """That lanes of an integer narrower than 64 bits do not wrap; nothing where its range says so."""
    bits = int(ramp.base.type[1:])
    top = (1 << (bits - 1)) - 1
    low, high = range_of(source)
    if bits == 64 or (-top - 1 < low and high < top):
        return ()
    travel = abs(ramp.step) * (lanes - 1)
    if travel > top:
        return (constant(False, "i1"),)
    limit, order = (top - travel, "icmp sle") if ramp.step > 0 else (travel - top - 1, "icmp sge")
    return (frame.b.compare(order, ramp.base, constant(limit, ramp.base.type)),)


def _extend(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    found = evaluate(frame, op.operands[0], window)
    if not isinstance(found, Ramp) or found.guards or op.operands[0].type.llvm == "i1":
        return _elementwise(frame, op, window, value)
    b, lane = frame.b, value.type.llvm
    guards = _wrap_guards(frame, found, window.lanes, op.operands[0])
    base = b.cast("sext", found.base, lane)
    if not guards:
        return Ramp(base, found.step)
    return Ramp(base, found.step, "", guards, lambda: b.cast("sext", as_vector(b, found, window.lanes), lane))


def _ramped(
    combine: Callable[[Frame, Op, Sequence[Uniform | Ramp]], int | None],
) -> InlineRule:
    """Integer arithmetic on evenly spaced lanes: `combine` gives the step of the result, None if it has none."""

    def rule(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
        operands = [evaluate(frame, operand, window) for operand in op.operands]
        even = [operand for operand in operands if not isinstance(operand, Lanes)]
        ramps = [operand for operand in even if isinstance(operand, Ramp)]
        step = combine(frame, op, even) if len(even) == len(operands) and ramps else None
        if step is None:
            return _elementwise(frame, op, window, value)
        b = frame.b
        base = lower_elementwise(b, op, [_first(operand) for operand in even])
        guards = tuple(dict.fromkeys(guard for ramp in ramps for guard in ramp.guards))
        if not guards:
            return Uniform(base) if step == 0 else Ramp(base, step)

        def exact() -> V:
            return lower_elementwise(b, op, [as_vector(b, operand, window.lanes) for operand in even])

        return Ramp(base, step, "", guards, exact)

    return rule


def _step(value: Uniform | Ramp) -> int:
    return value.step if isinstance(value, Ramp) else 0


def _product_step(frame: Frame, op: Op, even: Sequence[Uniform | Ramp]) -> int | None:
    for moving, factor in ((even[0], op.operands[1]), (even[1], op.operands[0])):
        number = constant_of(factor)
        if number is not None and _step(moving):
            return _step(moving) * number
    return None


def _elementwise(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    operands = [evaluate(frame, operand, window) for operand in op.operands]
    if all(isinstance(operand, Uniform) for operand in operands):
        return Uniform(lower_elementwise(frame.b, op, [_first(operand) for operand in operands]))
    vectors = [as_vector(frame.b, operand, window.lanes) for operand in operands]
    result = lower_elementwise(frame.b, op, vectors)
    return Lanes(result) if result.lanes else Uniform(result)


def _constant(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    return Uniform(frame.scalars[value])


def _bitcast(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    """Of pointers nothing changes, but what a step counts."""
    if value.type.element != "ptr":
        return _elementwise(frame, op, window, value)
    found = evaluate(frame, op.operands[0], window)
    if isinstance(found, Ramp):
        return Lanes(as_vector(frame.b, found, window.lanes)) if window.lanes > 1 else Uniform(found.base)
    return found


INLINE: dict[str, InlineRule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "arith.constant": _constant,
    "tt.splat": _splat,
    "tt.make_range": _range,
    "tt.expand_dims": _expand_dims,
    "tt.broadcast": _broadcast,
    "tt.trans": _transpose,
    "tt.reshape": _reshape,
    "tt.join": _join,
    "tt.split": _split,
    "tt.addptr": _add_pointer,
    "tt.bitcast": _bitcast,
    "arith.extsi": _extend,
    "arith.addi": _ramped(lambda frame, op, even: _step(even[0]) + _step(even[1])),
    "arith.subi": _ramped(lambda frame, op, even: _step(even[0]) - _step(even[1])),
    "arith.muli": _ramped(_product_step),
}
