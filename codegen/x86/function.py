"""The ops of a function in order: what is inline waits for its users, what is stored is written, the rest runs."""

from __future__ import annotations

import struct

from moecc.codegen.x86.builder import V, constant, nearest_bfloat
from moecc.codegen.x86.elementwise import ELEMENTWISE, lower_elementwise
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.evaluate import evaluate_vector, pointee_lane, write_tile
from moecc.codegen.x86.float_formats import bits_of_small
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.steps import integer, splat_text
from moecc.codegen.x86.tiles import Frame, Inline, Rule, Stored
from moecc.codegen.x86.tree import Block, Op
from moecc.codegen.x86.types import BYTES, Type, memory_type


def lower_block(frame: Frame, block: Block) -> None:
    """All ops but the terminator."""
    with_packed, frame.packed = frame.packed, {}
    for op in block.ops[:-1]:
        lower_op(frame, op)
    frame.packed = with_packed


def lower_op(frame: Frame, op: Op) -> None:
    tiled = bool(op.results) and op.result.type.is_tensor
    if op.name == "arith.constant":
        _constant(frame, op)
    elif tiled and op.name in frame.inline:
        for result in op.results:
            frame.tiles[result] = Inline(op)
            if result in frame.plan.stored:
                tile = frame.new_tile(result.type)
                write_tile(frame, result, tile)
                frame.tiles[result] = tile
    elif op.name in ELEMENTWISE and not tiled:
        _scalar(frame, op)
    else:
        frame.run(op)


def _scalar(frame: Frame, op: Op) -> None:
    try:
        frame.scalars[op.result] = lower_elementwise(
            frame.b, op, [frame.scalars[operand] for operand in op.operands]
        )
    except UnsupportedError as error:
        raise error.at(op.location) from None


def _constant(frame: Frame, op: Op) -> None:
    text, type_ = splat_text(op), op.result.type
    if text is not None:
        frame.scalars[op.result] = parse_constant(text, type_)
        if type_.is_tensor:
            frame.tiles[op.result] = Inline(op)
        return
    lane, items = _dense_items(str(op.attributes["value"]), type_)
    name = f"@constant.{len(frame.b.module.globals)}"
    body = ", ".join(f"{lane} {item}" for item in items)
    frame.b.module.globals[name] = f"{name} = private constant [{len(items)} x {lane}] [{body}], align 64"
    frame.tiles[op.result] = Stored(V(name, "ptr"), type_)


def _dense_items(text: str, type_: Type) -> tuple[str, list[str]]:
    """LLVM's type and the numbers of a constant of several; where they are many MLIR writes their bytes."""
    items = text.removeprefix("dense<").rpartition("> :")[0]
    lane = memory_type(type_.llvm)
    if not items.startswith('"0x'):
        listed = items.replace("[", "").replace("]", "").split(",")
        return lane, [str(parse_constant(item.strip(), type_)) for item in listed]
    data, size = bytes.fromhex(items.strip('"')[2:]), BYTES[type_.llvm]
    numbers = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
    return f"i{8 * size}", [str(number) for number in numbers]


def parse_constant(text: str, type_: Type) -> V:
    """A number as MLIR writes it: decimal, true or false, or the bits of a float in hexadecimal."""
    lane = type_.llvm
    if not type_.is_float:
        number = integer(text)
        return constant(int(text, 16) if number is None else number, lane)
    if text.startswith("0x"):
        bits = int(text, 16)
        if lane in ("i8", "i16"):
            return constant(bits, lane)
        form, back = {"float": ("<I", "<f"), "double": ("<Q", "<d"), "half": ("<H", "<e")}[lane]
        if lane == "half":
            return V(f"0xH{bits:04X}", lane)
        return constant(struct.unpack(back, struct.pack(form, bits))[0], lane)
    if lane == "i8":
        return constant(bits_of_small(float(text), type_.element), lane)
    return constant(nearest_bfloat(float(text)) if lane == "i16" else float(text), lane)


def _splat(frame: Frame, op: Op) -> None:
    frame.scalars[op.result] = frame.scalars[op.operands[0]]


def _add_pointer(frame: Frame, op: Op) -> None:
    pointer, offset = (frame.scalars[operand] for operand in op.operands)
    lane = pointee_lane(op.result)
    frame.scalars[op.result] = frame.b.emit(f"getelementptr {lane}, {pointer.typed}, {offset.typed}", "ptr")


def _program_id(frame: Frame, op: Op) -> None:
    frame.scalars[op.result] = V(f"%pid{op.integer('axis')}", "i32")


def _program_count(frame: Frame, op: Op) -> None:
    frame.scalars[op.result] = V(f"%programs{op.integer('axis')}", "i32")


def _nothing(frame: Frame, op: Op) -> None:
    """A program is one thread: it needs no barrier, and has nothing to assume."""


def _unsplat(frame: Frame, op: Op) -> None:
    rank = len(op.operands[0].type.dims)
    with frame.scope():
        frame.scalars[op.result] = evaluate_vector(frame, op.operands[0], Window((0,) * rank, (1,) * rank))


RULES: dict[str, Rule] = {
    "tt.addptr": _add_pointer,
    "tt.get_program_id": _program_id,
    "tt.get_num_programs": _program_count,
    "tt.unsplat": _unsplat,
    "gpu.barrier": _nothing,
    "ttg.barrier": _nothing,
    "ttg.local_barrier": _nothing,
    "llvm.intr.assume": _nothing,
}
