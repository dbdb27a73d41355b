"""Loads and stores: contiguous lanes by vector, scattered ones by gather and scatter, masked lanes never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moecc.codegen.x86.builder import Index, V, constant, like, vector
from moecc.codegen.x86.evaluate import evaluate, evaluate_vector, fastest_dim, pointee_lane, windows
from moecc.codegen.x86.lanes import Lanes, LaneValue, Ramp, Uniform, Window, all_hold, as_vector
from moecc.codegen.x86.row_masks import RowMasks, holds_for_row, row_masks_of_store
from moecc.codegen.x86.tiles import Frame, InlineRule, Rule
from moecc.codegen.x86.tree import Op, Value
from moecc.codegen.x86.types import BYTES

ROW_WORTH_A_BRANCH = 64
"""Elements of a row from which on it is skipped where nothing of it is stored."""

_BITS = {"half": "i16"}
"""Halves are moved as integers: LLVM has no masked or selected lanes of them and would convert each."""


def _moved_as(pointer: Value) -> str:
    lane = pointee_lane(pointer)
    return _BITS.get(lane, lane)


def _from_bits(frame: Frame, item: V, lane: str) -> V:
    """What was moved as bits or bytes, as the lanes that it is."""
    if lane == "i1":
        return frame.b.compare("icmp ne", item, constant(0, "i8", item.lanes))
    return frame.b.cast("bitcast", item, lane)


def _to_bits(frame: Frame, item: V) -> V:
    if item.lane_type == "i1":
        return frame.b.cast("zext", item, "i8")
    return frame.b.cast("bitcast", item, _BITS.get(item.lane_type, item.lane_type))


def _load(frame: Frame, op: Op, window: Window, value: Value) -> LaneValue:
    """Masked lanes are `other`, or zero where none is given."""
    b, lane = frame.b, _moved_as(op.operands[0])
    pointer = evaluate(frame, op.operands[0], window)
    mask = evaluate(frame, op.operands[1], window) if len(op.operands) > 1 else None
    other = op.operands[2] if len(op.operands) > 2 else None

    fallback = Uniform(_zero(lane, 0)) if other is None or mask is None else evaluate(frame, other, window)
    if isinstance(pointer, Uniform) and isinstance(mask, Uniform | None) and isinstance(fallback, Uniform):
        truth = mask.value if mask else None
        one = _load_one(frame, pointer.value, truth, lambda: _to_bits(frame, fallback.value), lane)
        return Uniform(_from_bits(frame, one, value.type.llvm))
    lanes = None if mask is None else as_vector(b, mask, window.lanes)
    rest = None if mask is None else _to_bits(frame, as_vector(b, fallback, window.lanes))
    many = _load_many(frame, pointer, lanes, rest, window.lanes, lane)
    return Lanes(_from_bits(frame, many, value.type.llvm))


def _zero(lane: str, lanes: int) -> V:
    return constant(0, lane, lanes) if lane != "ptr" else V("zeroinitializer", vector(lanes, "ptr"))


def _load_one(frame: Frame, pointer: V, mask: V | None, rest: Callable[[], V], lane: str) -> V:
    b = frame.b
    if mask is None:
        return b.load(lane, pointer)
    otherwise = rest()
    (loaded,) = b.choose(mask, lambda: [b.load(lane, pointer)], lambda: [otherwise])
    return loaded


def _load_many(frame: Frame, pointer: LaneValue, mask: V | None, rest: V | None, lanes: int, lane: str) -> V:
    b = frame.b
    if not isinstance(pointer, Ramp) or pointer.step != 1:
        return _gather(frame, as_vector(b, pointer, lanes), mask, rest, lane)

    def contiguous() -> V:
        type_ = vector(lanes, lane)
        if mask is None:
            return b.load(type_, pointer.base)
        assert rest is not None
        align = V(str(BYTES[lane]), "i32")
        return b.intrinsic(
            "llvm.masked.load", type_, pointer.base, align, mask, rest, overloads=[type_, "ptr"]
        )

    if pointer.exact is None:
        return contiguous()
    exact = pointer.exact
    (loaded,) = b.choose(
        all_hold(b, pointer.guards),
        lambda: [contiguous()],
        lambda: [_gather(frame, exact(), mask, rest, lane)],
        likely=True,
    )
    return loaded


def _gather(frame: Frame, pointers: V, mask: V | None, rest: V | None, lane: str) -> V:
    type_ = like(pointers, lane)
    return frame.b.intrinsic(
        "llvm.masked.gather",
        type_,
        pointers,
        V(str(BYTES[lane]), "i32"),
        mask or constant(True, "i1", pointers.lanes),
        rest or V("poison", type_),
        overloads=[type_, pointers.type],
    )


def _load_scalar(frame: Frame, op: Op) -> None:
    """A load of one element runs where it stands."""
    pointer, lane = op.operands[0], _moved_as(op.operands[0])
    mask = frame.scalars[op.operands[1]] if len(op.operands) > 1 else None

    def rest() -> V:
        return _to_bits(frame, frame.scalars[op.operands[2]]) if len(op.operands) > 2 else _zero(lane, 0)

    loaded = _load_one(frame, frame.scalars[pointer], mask, rest, lane)
    frame.scalars[op.result] = _from_bits(frame, loaded, op.result.type.llvm)


def _store(frame: Frame, op: Op) -> None:
    pointers, values, masks = op.operands[0], op.operands[1], op.operands[2:]
    if not pointers.type.is_tensor:
        with frame.scope():
            _store_window(frame, pointers, values, masks, Window((), ()))
        return
    along, row_masks = fastest_dim(pointers), row_masks_of_store(op)
    dims = pointers.type.dims
    if row_masks and along is None and dims[1] >= ROW_WORTH_A_BRANCH:
        _store_rows(
            frame, row_masks, dims, lambda window: _store_window(frame, pointers, values, masks, window)
        )
        return
    windows(frame, dims, lambda window: _store_window(frame, pointers, values, masks, window), along=along)


def _store_rows(
    frame: Frame, row_masks: RowMasks, dims: Sequence[int], body: Callable[[Window], None]
) -> None:
    """body at the windows of the rows that are not masked off as a whole."""

    def of_row(row: Index) -> None:
        with frame.scope():
            holds = holds_for_row(frame, row_masks, row)

        def inside() -> None:
            windows(frame, (1, dims[1]), lambda window: body(window.replace(0, row, 1)))

        frame.b.choose(holds, inside)

    frame.b.repeat(dims[0], 1, of_row)


def _store_window(frame: Frame, pointers: Value, values: Value, masks: list[Value], window: Window) -> None:
    b, lane = frame.b, _moved_as(pointers)
    pointer = evaluate(frame, pointers, window)
    mask = evaluate_vector(frame, masks[0], window) if masks else None
    item = _to_bits(frame, evaluate_vector(frame, values, window))
    if window.lanes == 1:
        assert isinstance(pointer, Uniform)
        one = pointer.value
        if mask is None:
            b.store(item, one)
        else:
            b.choose(mask, lambda: b.store(item, one))
    elif not isinstance(pointer, Ramp) or pointer.step != 1:
        _scatter(frame, item, as_vector(b, pointer, window.lanes), mask, lane)
    elif pointer.exact is None:
        _store_contiguous(frame, item, pointer.base, mask, lane)
    else:
        base, exact = pointer.base, pointer.exact
        b.choose(
            all_hold(b, pointer.guards),
            lambda: _store_contiguous(frame, item, base, mask, lane),
            lambda: _scatter(frame, item, exact(), mask, lane),
            likely=True,
        )


def _store_contiguous(frame: Frame, item: V, pointer: V, mask: V | None, lane: str) -> None:
    if mask is None:
        frame.b.store(item, pointer)
        return
    align = V(str(BYTES[lane]), "i32")
    frame.b.intrinsic("llvm.masked.store", "void", item, pointer, align, mask, overloads=[item.type, "ptr"])


def _scatter(frame: Frame, item: V, pointers: V, mask: V | None, lane: str) -> None:
    """Lanes in order: of several to one address the last one stays."""
    frame.b.intrinsic(
        "llvm.masked.scatter",
        "void",
        item,
        pointers,
        V(str(BYTES[lane]), "i32"),
        mask or constant(True, "i1", item.lanes),
        overloads=[item.type, pointers.type],
    )


INLINE: dict[str, InlineRule] = {"tt.load": _load}
RULES: dict[str, Rule] = {"tt.load": _load_scalar, "tt.store": _store}
