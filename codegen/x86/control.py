"""Loops, branches and the blocks of a function."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.codegen.x86.builder import V, constant
from moecc.codegen.x86.dots import (
    accumulates_in_place,
    begin_accumulating,
    dot_plan,
    finish_accumulating,
)
from moecc.codegen.x86.evaluate import evaluate_vector, store_window, windows, write_tile
from moecc.codegen.x86.function import lower_block
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.steps import shift_of
from moecc.codegen.x86.tiles import Frame, Inline, Rule, Shifted, Stored
from moecc.codegen.x86.tree import Block, Op, Value
from moecc.codegen.x86.types import BYTES
from moecc.codegen.x86.whole_dots import whole_dots


def _for(frame: Frame, op: Op) -> None:
    """Scalars and shifts of tiles travel in registers, other tiles in a buffer that every round overwrites."""
    if whole_dots(frame, op):
        return
    b, block = frame.b, op.body()
    counter, *arguments = block.arguments
    initials, yields = op.operands[3:], block.terminator.operands
    scalars = [i for i, argument in enumerate(arguments) if not argument.type.is_tensor]
    shifts = {i: shift for i, argument in enumerate(arguments) if (shift := shift_of(argument))}
    tiles = [i for i, argument in enumerate(arguments) if argument.type.is_tensor and i not in shifts]
    for i in tiles:
        _begin_carrying(frame, arguments[i], initials[i], yields[i])
    carried = [frame.scalars[initials[i]] for i in scalars]
    carried += [constant(0, _offset_type(arguments[i])) for i in shifts]

    def round_(iv: V, values: list[V]) -> Sequence[V]:
        frame.scalars[counter] = iv
        for i, value in zip(scalars, values, strict=False):
            frame.scalars[arguments[i]] = value
        offsets = dict(zip(shifts, values[len(scalars) :], strict=True))
        for i, offset in offsets.items():
            frame.tiles[arguments[i]] = Shifted(initials[i], offset)
        with frame.scope():
            lower_block(frame, block)
            moved = [_advance(frame, shifts[i].increment, offset) for i, offset in offsets.items()]
            _overwrite(frame, [(arguments[i], yields[i]) for i in tiles])
        return [*(frame.scalars[yields[i]] for i in scalars), *moved]

    finals = b.loop(
        frame.scalars[op.operands[0]],
        frame.scalars[op.operands[1]],
        frame.scalars[op.operands[2]],
        round_,
        carried,
        type_=frame.scalars[op.operands[0]].type,
        unsigned="unsignedCmp" in op.attributes,
    )
    for i, value in zip(scalars, finals, strict=False):
        frame.scalars[op.results[i]] = value
    for i, offset in zip(shifts, finals[len(scalars) :], strict=True):
        frame.tiles[op.results[i]] = Shifted(initials[i], offset)
    for i in tiles:
        frame.tiles[op.results[i]] = finish_accumulating(frame, arguments[i])


def _offset_type(argument: Value) -> str:
    return "i64" if argument.type.element == "ptr" else argument.type.llvm


def _advance(frame: Frame, increment: Value, offset: V) -> V:
    rank = len(increment.type.dims)
    by = evaluate_vector(frame, increment, Window((0,) * rank, (1,) * rank))
    return frame.b.op("add", offset, frame.b.cast("sext", by, offset.type))


def _begin_carrying(frame: Frame, argument: Value, initial: Value, following: Value) -> None:
    dot = accumulates_in_place(argument, following)
    if dot is not None:
        frame.tiles[argument] = begin_accumulating(frame, dot_plan(frame, dot), initial)
        return
    tile = frame.new_tile(argument.type)
    write_tile(frame, initial, tile)
    frame.tiles[argument] = tile


def _overwrite(frame: Frame, changes: Sequence[tuple[Value, Value]]) -> None:
    """The tiles that a round carries on, all from their old values.

    Tiles of one shape whose elements depend on the old ones at their own place only are written in one go; the
    others are first written elsewhere.
    """
    work = []
    for argument, following in changes:
        tile = frame.tiles[argument]
        if isinstance(tile, Stored) and frame.tiles[following] != tile:
            work.append((tile, following))
    buffers = {tile.buffer for tile, _ in work}
    groups: dict[tuple[int, ...], list[tuple[Stored, Value]]] = {}
    copies = []
    for tile, following in work:
        others = buffers - {other.buffer for other, _ in work if other.type.dims == tile.type.dims}
        if _touches(frame, [following], others) or not _keeps_places(frame, following, buffers):
            copies.append((tile, frame.new_tile(tile.type), following))
        else:
            groups.setdefault(tile.type.dims, []).append((tile, following))
    for _, copy, following in copies:
        write_tile(frame, following, copy)
    for group in groups.values():
        _write_together(frame, group)
    for tile, copy, _ in copies:
        _copy(frame, copy, tile)


def _write_together(frame: Frame, group: Sequence[tuple[Stored, Value]]) -> None:
    def body(window: Window) -> None:
        items = [evaluate_vector(frame, following, window) for _, following in group]
        for (tile, _), item in zip(group, items, strict=True):
            store_window(frame, tile, window, item)

    windows(frame, group[0][0].type.dims, body)


def _keeps_places(frame: Frame, value: Value, buffers: set[V]) -> bool:
    """Each element depends on the elements of these buffers at its own place only."""
    todo, seen = [value], {value}
    while todo:
        tile = frame.tiles.get(todo.pop())
        if isinstance(tile, Shifted):
            below = [tile.initial]
        elif not isinstance(tile, Inline):
            continue
        elif tile.op.name.partition(".")[0] in ("arith", "math"):
            below = tile.op.operands
        elif _touches(frame, tile.op.operands, buffers):
            return False
        else:
            continue
        fresh = [operand for operand in below if operand not in seen]
        seen.update(fresh)
        todo += fresh
    return True


def _touches(frame: Frame, values: Sequence[Value], buffers: set[V]) -> bool:
    """Some value is evaluated from one of the buffers."""
    todo, seen = list(values), set(values)
    while todo:
        tile = frame.tiles.get(todo.pop())
        if isinstance(tile, Stored) and tile.buffer in buffers:
            return True
        below = list(tile.op.operands) if isinstance(tile, Inline) else []
        below += [tile.initial] if isinstance(tile, Shifted) else []
        fresh = [operand for operand in below if operand not in seen]
        seen.update(fresh)
        todo += fresh
    return False


def _copy(frame: Frame, source: Stored, target: Stored) -> None:
    size = constant(source.type.size * _bytes(source), "i64")
    false = constant(False, "i1")
    frame.b.intrinsic(
        "llvm.memcpy", "void", target.buffer, source.buffer, size, false, overloads=["ptr", "ptr", "i64"]
    )


def _bytes(tile: Stored) -> int:
    return BYTES[tile.type.llvm]


def _if(frame: Frame, op: Op) -> None:
    b = frame.b
    for result in op.results:
        if result.type.is_tensor:
            frame.tiles[result] = frame.new_tile(result.type)

    def branch(region: int) -> list[V]:
        if region >= len(op.regions) or not op.regions[region]:
            return []
        with frame.scope():
            block = op.body(region)
            lower_block(frame, block)
            return _yield_to(frame, block.terminator.operands, op.results)

    values = b.choose(frame.scalars[op.operands[0]], lambda: branch(0), lambda: branch(1))
    scalars = [result for result in op.results if not result.type.is_tensor]
    frame.scalars.update(zip(scalars, values, strict=True))


def _yield_to(frame: Frame, values: Sequence[Value], targets: Sequence[Value]) -> list[V]:
    """Write the tiles into those of the targets, which have a buffer; the scalars."""
    for value, target in zip(values, targets, strict=True):
        tile = frame.tiles.get(target)
        if target.type.is_tensor:
            assert isinstance(tile, Stored)
            write_tile(frame, value, tile)
    return [frame.scalars[value] for value in values if not value.type.is_tensor]


def _while(frame: Frame, op: Op) -> None:
    """The condition's arguments are the results and what the body sees; the body yields the next round's."""
    b, before, after = frame.b, op.body(0), op.body(1)
    for argument, initial in zip(before.arguments, op.operands, strict=True):
        if argument.type.is_tensor:
            tile = frame.new_tile(argument.type)
            write_tile(frame, initial, tile)
            frame.tiles[argument] = tile
    for result, argument in zip(op.results, after.arguments, strict=True):
        if result.type.is_tensor:
            frame.tiles[result] = frame.tiles[argument] = frame.new_tile(result.type)
    entry, head, body, done = b.current, b.label(), b.label(), b.label()
    b.branch(head)
    b.start(head)
    scalars = [argument for argument in before.arguments if not argument.type.is_tensor]
    place = len(b.lines)
    for argument in scalars:
        frame.scalars[argument] = V(b.fresh(), argument.type.llvm)
    with frame.scope():
        lower_block(frame, before)
        condition, *passed = before.terminator.operands
        values = _yield_to(frame, passed, op.results)
        for targets in (op.results, after.arguments):
            flat = [target for target in targets if not target.type.is_tensor]
            frame.scalars.update(zip(flat, values, strict=True))
        b.run(f"br {frame.scalars[condition].typed}, label %{body}, label %{done}")
    b.start(body)
    with frame.scope():
        lower_block(frame, after)
        yields = after.terminator.operands
        changes = [pair for pair in zip(before.arguments, yields, strict=True) if pair[0].type.is_tensor]
        _overwrite(frame, changes)
    following = [frame.scalars[value] for value in yields if not value.type.is_tensor]
    end = b.current
    b.branch(head)
    first = [frame.scalars[initial] for initial in op.operands if not initial.type.is_tensor]
    b.lines[place:place] = [
        f"  {frame.scalars[argument]} = phi {argument.type.llvm} [ {a}, %{entry} ], [ {c}, %{end} ]"
        for argument, a, c in zip(scalars, first, following, strict=True)
    ]
    b.start(done)


def lower_region(
    frame: Frame, blocks: Sequence[Block], results: Sequence[V], leave: str = "ret void"
) -> None:
    """The blocks of a function, which only branch forward; `results` are where its values go before it leaves."""
    b = frame.b
    labels = {block.label: b.label() for block in blocks}
    by_label = {block.label: block for block in blocks}
    incoming: dict[str, list[tuple[str, list[V]]]] = {label: [] for label in labels}
    for block in blocks[1:]:
        for argument in block.arguments:
            if argument.type.is_tensor:
                frame.tiles[argument] = frame.new_tile(argument.type)

    def jump(label: str, values: Sequence[Value]) -> None:
        scalars = _yield_to(frame, values, by_label[label].arguments)
        incoming[label].append((b.current, scalars))
        b.branch(labels[label])

    for block in blocks:
        if block is not blocks[0]:
            b.start(labels[block.label])
            _merge(frame, block, incoming[block.label])
        with frame.scope():
            lower_block(frame, block)
            _terminate(frame, block.terminator, jump, results, leave)


def _merge(frame: Frame, block: Block, incoming: Sequence[tuple[str, list[V]]]) -> None:
    scalars = [argument for argument in block.arguments if not argument.type.is_tensor]
    for number, argument in enumerate(scalars):
        pairs = ", ".join(f"[ {values[number]}, %{label} ]" for label, values in incoming)
        frame.scalars[argument] = frame.b.emit(f"phi {argument.type.llvm} {pairs}", argument.type.llvm)


def _terminate(frame: Frame, op: Op, jump: object, results: Sequence[V], leave: str) -> None:
    b = frame.b
    assert callable(jump)
    if op.name in ("tt.return", "tt.map_elementwise.return"):
        for value, place in zip(op.operands, results, strict=True):
            if value.type.is_tensor:
                write_tile(frame, value, Stored(place, value.type))
            else:
                b.store(frame.scalars[value], place)
        b.run(leave)
    elif op.name == "cf.br":
        jump(op.successors[0], op.operands)
    else:
        assert op.name == "cf.cond_br", op.name
        _, count, _ = op.integers("operandSegmentSizes")
        condition, *values = op.operands
        yes, no = b.label(), b.label()
        b.run(f"br {frame.scalars[condition].typed}, label %{yes}, label %{no}")
        for label, successor, passed in (
            (yes, op.successors[0], values[:count]),
            (no, op.successors[1], values[count:]),
        ):
            b.start(label)
            with frame.scope():
                jump(successor, passed)


RULES: dict[str, Rule] = {"scf.for": _for, "scf.if": _if, "scf.while": _while}
