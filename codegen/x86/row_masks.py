"""Rows of a matrix that nothing reads: stores mask them off as a whole.

Contract: a product need not compute such rows, nor a store look at them; what a program writes stays the same.
"""

from __future__ import annotations

from moecc.codegen.x86.builder import Index, V, constant
from moecc.codegen.x86.evaluate import evaluate_vector, windows
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.tiles import Frame
from moecc.codegen.x86.tree import Op, Value

RowMasks = frozenset[Value]
"""Truth values [rows] or [rows, 1]: an element of a row where one of them is false is not read."""

NOTHING_KNOWN: RowMasks = frozenset()


def row_masks_of_readers(value: Value) -> RowMasks:
    """Of everything that reads elements of this matrix, directly or through ops that work element by element."""
    seen, todo = {value}, [value]
    found: list[RowMasks] = []
    while todo:
        here = todo.pop()
        for user in here.users:
            if user.name == "tt.store" and _places(user, here) == [1]:
                found.append(row_masks_of_store(user))
                continue
            following = _passed_on(here, user)
            if following is None:
                return NOTHING_KNOWN
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return frozenset.intersection(*found) if found else NOTHING_KNOWN


def _places(op: Op, value: Value) -> list[int]:
    return [i for i, operand in enumerate(op.operands) if operand is value]


def _passed_on(value: Value, user: Op) -> Value | None:
    """What the op makes of the matrix, each element of the one at its place; None for any other op."""
    if user.name == "tt.dot" and _places(user, value) == [2]:
        return user.result
    if user.name == "scf.yield":
        return _after_loop(value, user)
    if user.name.partition(".")[0] not in ("arith", "math") or len(user.results) != 1:
        return None
    result = user.result.type
    computes = result.is_float or result.element == "i1"  # An integer division would trap.
    return user.result if computes and result.dims == value.type.dims else None


def _after_loop(value: Value, end: Op) -> Value | None:
    """The result of a loop that only adds products to the matrix."""
    loop = end.block.owner if end.block else None
    if loop is None or loop.name != "scf.for" or len(_places(end, value)) != 1:
        return None
    (position,) = _places(end, value)
    argument = loop.body().arguments[1 + position]
    dot = value.op
    adds = dot is not None and dot.name == "tt.dot" and dot.operands[2] is argument
    return loop.results[position] if adds and argument.users == [dot] else None


def row_masks_of_store(store: Op) -> RowMasks:
    return _parts(store.operands[2]) if len(store.operands) > 2 else NOTHING_KNOWN


def _parts(mask: Value) -> RowMasks:
    """Of all whose conjunction a mask [rows, columns] is, those that are the same in every column."""
    op = mask.op
    if op is None or len(mask.type.dims) != 2:
        return NOTHING_KNOWN
    if op.name == "arith.andi":
        return _parts(op.operands[0]) | _parts(op.operands[1])
    if op.name == "tt.broadcast" and op.operands[0].type.dims[1] == 1:
        return _conjuncts(op.operands[0])
    return NOTHING_KNOWN


def _conjuncts(column: Value) -> RowMasks:
    op = column.op
    if op is not None and op.name == "arith.andi":
        return _conjuncts(op.operands[0]) | _conjuncts(op.operands[1])
    if op is not None and op.name == "tt.expand_dims" and op.integer("axis") == 1:
        return _conjuncts(op.operands[0])
    return frozenset({column})


def holds_for_row(frame: Frame, masks: RowMasks, row: Index) -> V:
    total = constant(True, "i1")
    for mask in _in_order(frame, masks):
        place = Window((row, 0)[: len(mask.type.dims)], (1, 1)[: len(mask.type.dims)])
        total = frame.b.op("and", total, evaluate_vector(frame, mask, place))
    return total


def count_rows(frame: Frame, masks: RowMasks) -> V | None:
    """One more than the last row that may be read, an i64; None where no mask is known by now."""
    counts = [_count_rows(frame, mask) for mask in _in_order(frame, masks)]
    if not counts:
        return None
    least, *others = counts
    for count in others:
        least = frame.b.intrinsic("llvm.smin", "i64", least, count)
    return least


def _in_order(frame: Frame, masks: RowMasks) -> list[Value]:
    """Those that have been lowered, in an order that is the same in every process."""
    position = frame.plan.position
    known = [(position[mask.op], mask) for mask in masks if mask in frame.tiles and mask.op is not None]
    return [mask for _, mask in sorted(known, key=lambda item: item[0])]


def _count_rows(frame: Frame, mask: Value) -> V:
    b = frame.b
    count = b.allocate("i64", 1)
    b.store(constant(0, "i64"), count)

    def look(window: Window) -> None:
        truths = evaluate_vector(frame, mask, window)
        packed = f"i{window.lanes}"
        bits = b.cast("zext", b.emit(f"bitcast {truths.typed} to {packed}", packed), "i64")
        zeros = b.intrinsic("llvm.ctlz", "i64", bits, constant(False, "i1"), overloads=["i64"])
        within = b.op("sub", constant(64, "i64"), zeros)
        base = window.base[0]
        end = b.op("add", within, base if isinstance(base, V) else constant(base, "i64"))
        some = b.compare("icmp ne", bits, constant(0, "i64"))
        b.store(b.select(some, end, b.load("i64", count)), count)

    windows(frame, mask.type.dims, look)
    return b.load("i64", count)
