"""Elements taken by their index, tiles put one behind the other, and elements counted."""

from __future__ import annotations

from moecc.codegen.x86.builder import V, constant, constants
from moecc.codegen.x86.evaluate import (
    evaluate_vector,
    gather_elements,
    store_window,
    stored,
    windows,
    write_tile,
)
from moecc.codegen.x86.lanes import Window
from moecc.codegen.x86.tiles import Frame, Rule, Stored
from moecc.codegen.x86.tree import Op
from moecc.codegen.x86.types import BYTES


def _gather(frame: Frame, op: Op) -> None:
    """result[i, j] = source[i, index[i, j]] along axis 1. Indices count modulo the size, so none leaves the source."""
    b, axis, (values, indices) = frame.b, op.integer("axis"), op.operands
    source, result = stored(frame, values), frame.new_tile(op.result.type)
    size, strides = source.type.dims[axis], source.strides
    others = [0 if dim == axis else stride for dim, stride in enumerate(strides)]

    def some(window: Window) -> None:
        index = evaluate_vector(frame, indices, window)
        index = b.op("and", b.cast("zext", index, "i64"), constant(size - 1, "i64", index.lanes))
        offset = b.op("mul", index, constant(strides[axis], "i64", index.lanes))
        start = b.address(source.buffer, b.dot_index(window.base, others), source.type.llvm)
        lanes = constants(window.offsets(others), "i64") if offset.lanes else constant(0, "i64")
        item = gather_elements(frame, start, b.op("add", offset, lanes), source.type.llvm)
        store_window(frame, result, window, item)

    windows(frame, op.result.type.dims, some)
    frame.tiles[op.result] = result


def _concatenate(frame: Frame, op: Op) -> None:
    result, start = frame.new_tile(op.result.type), 0
    for operand in op.operands:
        part = frame.b.address(result.buffer, start, result.type.llvm)
        write_tile(frame, operand, Stored(part, operand.type))
        start += operand.type.size
    frame.tiles[op.result] = result


def _histogram(frame: Frame, op: Op) -> None:
    """Elements that are no number of a bin are not counted."""
    b, values, masks = frame.b, op.operands[0], op.operands[1:]
    result = frame.new_tile(op.result.type)
    bins, size = op.result.type.size, op.result.type.size * BYTES["i32"]
    nothing, quiet = constant(0, "i8"), constant(False, "i1")
    b.intrinsic(
        "llvm.memset", "void", result.buffer, nothing, constant(size, "i64"), quiet, overloads=["ptr", "i64"]
    )

    def count(bin_: V, counted: V) -> None:
        address = b.emit(f"getelementptr i32, {result.buffer.typed}, {bin_.typed}", "ptr")
        b.store(b.op("add", b.load("i32", address), b.cast("zext", counted, "i32")), address)

    def some(window: Window) -> None:
        number = b.cast("zext", evaluate_vector(frame, values, window), "i64")
        counted = b.compare("icmp ult", number, constant(bins, "i64", number.lanes))
        if masks:
            counted = b.op("and", counted, evaluate_vector(frame, masks[0], window))
        place = b.select(counted, number, constant(0, "i64", number.lanes))
        if not place.lanes:
            count(place, counted)
        for lane in range(place.lanes):
            count(b.extract(place, lane), b.extract(counted, lane))

    windows(frame, values.type.dims, some)
    frame.tiles[op.result] = result


RULES: dict[str, Rule] = {"tt.gather": _gather, "tt.cat": _concatenate, "tt.histogram": _histogram}
