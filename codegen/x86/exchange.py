"""Neighbours along a dimension of two that change places, which tl.sort, tl.topk and tl.flip write as exclusive ors.

`x ^ broadcast(reduce_xor(x, axis))` over an axis of size 2 is x with the two elements along it exchanged. The tree is
rewritten so that it says so; a tile is then put in memory once for all exchanges within a vector, not for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.codegen.x86.builder import V
from moecc.codegen.x86.elementwise import ELEMENTWISE
from moecc.codegen.x86.evaluate import evaluate, lane_extents, write_tile
from moecc.codegen.x86.lanes import Lanes, LaneValue, Uniform, Window, as_vector, row_major
from moecc.codegen.x86.tiles import Frame, InlineRule, Rule, Stored
from moecc.codegen.x86.tree import Block, Op, Value

EXCHANGE, KEEP = "x86.exchange", "x86.keep"
"""An exchange has an `axis`, and may give the operand's bits as another type; keep puts a tile into memory."""


@dataclass(eq=False)
class Keep(Op):
    """`outlived` is an earlier one whose result nothing reads any more: its memory is free."""

    outlived: Keep | None = None


def rewrite_exchanges(function: Op, lanes: int) -> None:
    """Contract: no element is computed more than twice for the exchanges of one tile.

    Where a tile is needed both as it is and exchanged across vectors of `lanes` elements, it is kept in memory; so is
    one that exchanges within a vector lead to, before anything sees it through windows of another form.
    """
    for op in list(function.walk()):
        found = _exchanged(op)
        if found is not None:
            _replace(op, *found)
    tangled: dict[Value, None] = {}
    for op in list(function.walk()):
        if op.name == EXCHANGE and any(user is not op for user in op.operands[0].users):
            source, axis = op.operands[0], op.integer("axis")
            if lane_extents(source.type.dims, lanes)[axis] == 1:
                _keep(source)
            tangled[op.result] = None
        elif op.results and _keeps_form(op) and any(operand in tangled for operand in op.operands):
            tangled[op.result] = None
    for value in tangled:
        if not all(_keeps_form(user) for user in value.users):
            _keep(value)
    for block in {op.block: None for op in function.walk() if isinstance(op, Keep) and op.block}:
        _share_memory(block)


def _exchanged(op: Op) -> tuple[Value, int] | None:
    """(x, axis) if op is `x ^ broadcast(reduce_xor(x, axis))`."""
    if op.name != "arith.xori" or not op.result.type.is_tensor:
        return None
    for kept, spread in (op.operands, op.operands[::-1]):
        repeat = spread.op
        grown = repeat.operands[0].op if repeat and repeat.name == "tt.broadcast" else None
        reduce = grown.operands[0].op if grown and grown.name in ("tt.expand_dims", "tt.reshape") else None
        if grown is None or reduce is None or reduce.name != "tt.reduce" or reduce.operands != [kept]:
            continue
        axis, dims, body = reduce.integer("axis"), kept.type.dims, reduce.body()
        first = body.ops[0]
        pair = (
            len(body.ops) == 2 and first.name == "arith.xori" and set(first.operands) == set(body.arguments)
        )
        if pair and dims[axis] == 2 and grown.result.type.dims == (*dims[:axis], 1, *dims[axis + 1 :]):
            return kept, axis
    return None


def _replace(op: Op, source: Value, axis: int) -> None:
    while source.op and source.op.name == "tt.bitcast" and source.type.element != "ptr":
        source = source.op.operands[0]
    old, op.operands = op.operands, [source]
    op.name, op.attributes = EXCHANGE, {"axis": axis}
    source.users.append(op)
    for operand in old:
        operand.users.remove(op)
        _erase_unused(operand)


def _erase_unused(value: Value) -> None:
    op = value.op
    if op is None or op.block is None or any(result.users for result in op.results):
        return
    if op.name in ("tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.reduce", "tt.bitcast"):
        op.block.ops.remove(op)
        for operand in op.operands:
            operand.users.remove(op)
            _erase_unused(operand)


def _keeps_form(op: Op) -> bool:
    """What it needs of its operands is at the places of its result, or their neighbours."""
    return op.name in (EXCHANGE, KEEP) or op.name in ELEMENTWISE


def _keep(value: Value) -> None:
    """Insert an op behind the value's own that puts it into memory, for all users."""
    op = value.op
    if op is None or op.block is None or any(user.name == KEEP for user in value.users):
        return
    keep = Keep(KEEP, [value], [], {}, [], op.location, op.block)
    kept = Value(f"{value.name}.kept", value.type, keep, value.users)
    keep.results, value.users = [kept], [keep]
    for user in kept.users:
        user.operands = [kept if operand is value else operand for operand in user.operands]
    op.block.ops.insert(op.block.ops.index(op) + 1, keep)


def _share_memory(block: Block) -> None:
    """What is kept takes over the memory of what was: a sort needs two buffers, not one for each stage."""
    place = {op: number for number, op in enumerate(block.ops)}
    earlier: dict[Keep, int] = {}
    for op in block.ops:
        if not isinstance(op, Keep):
            continue
        free = (
            old for old, last in earlier.items() if last < place[op] and old.result.type == op.result.type
        )
        op.outlived = next(free, None)
        if op.outlived:
            del earlier[op.outlived]
        earlier[op] = _last_reader(op.result, block, place)


def _last_reader(kept: Value, block: Block, place: dict[Op, int]) -> int:
    """The place of the last op that may read what is kept, itself or by values that are evaluated later."""
    last, seen, todo = 0, {kept}, [kept]
    while todo:
        for user in todo.pop().users:
            here = user
            while here.block is not block:
                assert here.block is not None
                here = here.block.owner
            last = max(last, place[here])
            fresh = [result for result in here.results if result not in seen and here.name != KEEP]
            seen.update(fresh)
            todo += fresh
    return last


def _exchange(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    b, axis, (source,) = frame.b, op.integer("axis"), op.operands
    base, lane = window.base[axis], value.type.llvm
    if window.extent[axis] == 1:
        other = 1 - base if isinstance(base, int) else b.op("xor", base, V("1", "i64"))
        found = evaluate(frame, source, window.replace(axis, other, 1))
    else:
        found = evaluate(frame, source, window)
        stride = row_major(window.extent)[axis]
        items = as_vector(b, found, window.lanes)
        found = Lanes(b.shuffle(items, items, [lane ^ stride for lane in range(window.lanes)]))
    if isinstance(found, Uniform):
        return Uniform(b.cast("bitcast", found.value, lane))
    return Lanes(b.cast("bitcast", as_vector(b, found, window.lanes), lane))


def _write(frame: Frame, op: Op) -> None:
    """What is in memory already stays where it is, and its memory is not given on."""
    assert isinstance(op, Keep)
    tile = frame.tiles[op.operands[0]]
    if not isinstance(tile, Stored):
        tile = _owned(frame, op.outlived) or frame.new_tile(op.result.type)
        write_tile(frame, op.operands[0], tile)
    frame.tiles[op.result] = tile


def _owned(frame: Frame, keep: Keep | None) -> Stored | None:
    tile = frame.tiles[keep.result] if keep else None
    return tile if keep and isinstance(tile, Stored) and frame.tiles[keep.operands[0]] != tile else None


INLINE: dict[str, InlineRule] = {EXCHANGE: _exchange}
RULES: dict[str, Rule] = {KEEP: _write}
