"""`tl.dot`: operands as rows in memory, packed once for all dots that share them; accumulators that stay in place."""

from __future__ import annotations

from dataclasses import replace

from moecc.codegen.x86.builder import Index, V, constant, vector
from moecc.codegen.x86.dot import plan_dot
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over, Rows
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.evaluate import evaluate, evaluate_vector, stored, windows
from moecc.codegen.x86.lanes import Ramp, Uniform, Window
from moecc.codegen.x86.row_masks import count_rows, row_masks_of_readers
from moecc.codegen.x86.steps import constant_of, splat_text, step
from moecc.codegen.x86.tiles import Accumulating, Frame, Inline, Rule, Stored, Tile
from moecc.codegen.x86.tree import Op, Value
from moecc.codegen.x86.types import BYTES


def accumulates_in_place(argument: Value, following: Value) -> Op | None:
    """The dot that alone reads what a loop carries, as its accumulator, and whose result alone is carried on."""
    op = following.op
    if op is None or op.name != "tt.dot" or op.operands[2] is not argument:
        return None
    alone = len(argument.users) == 1 and len(following.users) == 1 and len(argument.type.dims) == 2
    inside = op.block is not None and argument in op.block.arguments
    return op if alone and inside else None


def begin_accumulating(frame: Frame, plan: DotPlan, initial: Value) -> Accumulating:
    """A buffer of the plan's that holds the initial value."""
    buffer = _allocate(frame, plan.accumulator_bytes)
    _initialise(frame, plan, buffer, initial)
    return Accumulating(buffer, plan)


def finish_accumulating(frame: Frame, argument: Value) -> Tile:
    """Row-major from here on."""
    tile = frame.tiles[argument]
    return _as_rows(frame, tile, argument) if isinstance(tile, Accumulating) else tile


def _as_rows(frame: Frame, tile: Accumulating, value: Value) -> Stored:
    plan = tile.dot
    if plan.plain:
        return Stored(tile.buffer, value.type)
    rows = frame.new_tile(value.type)
    plan.to_rows(frame.b, tile.buffer, rows.buffer)
    return rows


def _initialise(frame: Frame, plan: DotPlan, buffer: V, initial: Value) -> None:
    if is_zero(initial):
        plan.zero(frame.b, buffer)
    else:
        _accumulate_from(frame, plan, buffer, stored(frame, initial).buffer)


def _accumulate_from(frame: Frame, plan: DotPlan, buffer: V, rows: V) -> None:
    if plan.plain:
        size = constant(plan.accumulator_bytes, "i64")
        false = constant(False, "i1")
        frame.b.intrinsic("llvm.memcpy", "void", buffer, rows, size, false, overloads=["ptr", "ptr", "i64"])
    else:
        plan.from_rows(frame.b, rows, buffer)


def is_zero(value: Value) -> bool:
    op = value.op
    if op is not None and op.name == "tt.splat":
        return is_zero(op.operands[0])
    if op is None or op.name != "arith.constant":
        return False
    text = splat_text(op)
    return constant_of(value) == 0 or (text is not None and value.type.is_float and _float(text) == "0.0")


def _float(text: str) -> str:
    """`-0.0` is not zero: adding to it differs."""
    return repr(float(text)) if not text.startswith("0x") else text


def _allocate(frame: Frame, count: int) -> V:
    return frame.allocate("i8", max(count, 1))


def dot_plan(frame: Frame, op: Op, *, rounds: int = 1) -> DotPlan:
    """How to compute a dot, over as many blocks of k as `rounds` says."""
    a, b, _ = op.operands
    (m, k), n = a.type.dims[-2:], b.type.dims[-1]
    shape = DotShape(m, n, rounds * k, a.type.element, b.type.element, op.result.type.element)
    rank = len(a.type.dims)
    a_over = _over(frame, a, outer=rank - 2, inner=rank - 1)
    b_over = _over(frame, b, outer=rank - 1, inner=rank - 2)
    return plan_dot(shape, frame.level, a_over=a_over, b_over=b_over)


def _over(frame: Frame, value: Value, *, outer: int, inner: int) -> Over:
    """What the operand's rows run over, as it lies in memory; `inner` is the dimension of k."""
    op = value.op
    if op is not None and value not in frame.plan.stored:
        if op.name == "tt.trans" and op.integers("order")[-2:] == (
            len(value.type.dims) - 1,
            len(value.type.dims) - 2,
        ):
            return _over(frame, op.operands[0], outer=inner, inner=outer)
        if op.name == "tt.load":
            if step(op.operands[0], inner) == 1 or value.type.dims[inner] == 1:
                return "outer"
            if step(op.operands[0], outer) == 1:
                return "k"
    return "outer" if inner > outer else "k"


def _dot(frame: Frame, op: Op) -> None:
    plan, carried = dot_plan(frame, op), frame.tiles.get(op.operands[2])
    if len(op.result.type.dims) == 3:
        _batched(frame, op, plan)
        return
    if isinstance(carried, Accumulating):
        multiply(frame, op, plan, carried.buffer)
        frame.tiles[op.result] = carried
        return
    frame.tiles[op.result] = finished_product(frame, op, plan, op.operands[2])


def finished_product(frame: Frame, op: Op, plan: DotPlan, initial: Value) -> Stored:
    """initial + A @ B, row-major, over as many blocks of k as the plan was made for."""
    if not is_zero(initial):
        begun = begin_accumulating(frame, plan, initial)
        multiply(frame, op, plan, begun.buffer)
        return _as_rows(frame, begun, op.result)
    accumulator = _allocate(frame, plan.accumulator_bytes)
    rows = Stored(accumulator, op.result.type) if plan.plain else frame.new_tile(op.result.type)
    used = _used_rows(frame, op, plan)
    b = _packed(frame, plan, op.operands[1], (), is_a=False)
    a = _packed(frame, plan, op.operands[0], (), is_a=True, used=used)
    plan.product(frame.b, a, b, accumulator, rows.buffer, used)
    return rows


def _batched(frame: Frame, op: Op, plan: DotPlan) -> None:
    """One product for each index of the first dimension."""
    result = frame.new_tile(op.result.type)
    initial = stored(frame, op.operands[2])
    buffer = _allocate(frame, plan.accumulator_bytes)
    b, lane = frame.b, op.result.type.llvm
    size = plan.shape.m * plan.shape.n

    def product(batch: Index) -> None:
        with frame.scope():
            offset = b.multiply(batch, size)
            _accumulate_from(frame, plan, buffer, b.address(initial.buffer, offset, lane))
            multiply(frame, op, plan, buffer, (batch,))
            target = b.address(result.buffer, offset, lane)
            if plan.plain:
                bytes_ = constant(size * BYTES[lane], "i64")
                false = constant(False, "i1")
                b.intrinsic(
                    "llvm.memcpy", "void", target, buffer, bytes_, false, overloads=["ptr", "ptr", "i64"]
                )
            else:
                plan.to_rows(b, buffer, target)

    b.repeat(op.result.type.dims[0], 1, product)
    frame.tiles[op.result] = result


def multiply(frame: Frame, op: Op, plan: DotPlan, accumulator: V, batch: tuple[Index, ...] = ()) -> None:
    """accumulator += A @ B, over as many blocks of k as the plan was made for."""
    used = _used_rows(frame, op, plan)
    b = _packed(frame, plan, op.operands[1], batch, is_a=False)
    a = _packed(frame, plan, op.operands[0], batch, is_a=True, used=used)
    plan.multiply(frame.b, a, b, accumulator, used)


def _used_rows(frame: Frame, op: Op, plan: DotPlan) -> V | None:
    """How many rows of the result have a reader, if that is known before the dot; once for all dots that share it."""
    if not plan.skips_rows:
        return None
    masks = row_masks_of_readers(op.result)
    key = "rows", masks
    if key not in frame.packed:
        frame.packed[key] = count_rows(frame, masks)
    return frame.packed[key]


def _packed(
    frame: Frame,
    plan: DotPlan,
    value: Value,
    batch: tuple[Index, ...],
    *,
    is_a: bool,
    used: V | None = None,
) -> V:
    """The operand as the plan reads it; once for all dots of this block that share it."""
    key = value, plan, is_a, batch, used
    if key not in frame.packed:
        rank = len(value.type.dims)
        outer, inner = (rank - 2, rank - 1) if is_a else (rank - 1, rank - 2)
        rows = _rows(frame, value, plan.a_over if is_a else plan.b_over, batch, outer=outer, inner=inner)
        rows = replace(rows, length=plan.shape.k) if plan.shape.k > value.type.dims[inner] else rows
        packed = _allocate(frame, plan.a_bytes if is_a else plan.b_bytes)
        (plan.pack_a if is_a else plan.pack_b)(frame.b, replace(rows, used=used), packed)
        frame.packed[key] = packed
    found = frame.packed[key]
    assert found is not None
    return found


def _rows(
    frame: Frame, value: Value, over: Over, batch: tuple[Index, ...], *, outer: int, inner: int
) -> Rows:
    """The operand as row addresses: its own memory where that is whole and contiguous, else a copy."""
    op, dims = value.op, value.type.dims
    row, along = (outer, inner) if over == "outer" else (inner, outer)
    lane = value.type.llvm
    pointers = _allocate(frame, 8 * dims[row])
    rows = Rows(pointers, dims[row], dims[along], value.type.element)
    source, swapped = value, False
    while op is not None and op.name == "tt.trans" and source not in frame.plan.stored and len(dims) == 2:
        source, swapped = op.operands[0], not swapped
        op = source.op
    if swapped:
        row, along = 1 - row, 1 - along
    tile = frame.tiles[source]
    if isinstance(tile, Stored) and along == len(dims) - 1:
        start = tile.buffer
        if batch:
            start = frame.b.address(start, frame.b.multiply(batch[0], tile.strides[0]), lane)
        _point(frame, pointers, start, rows, lane)
        return rows
    if isinstance(tile, Inline) and tile.op.name == "tt.load" and _is_contiguous(tile.op, along):
        _rows_of_load(frame, tile.op, rows, batch, row=row, along=along)
        return rows
    _copy_rows(frame, source, rows, batch, row=row, along=along)
    return rows


def _is_contiguous(load: Op, dim: int) -> bool:
    return step(load.operands[0], dim) == 1 or load.result.type.dims[dim] == 1


def _point(frame: Frame, pointers: V, start: V, rows: Rows, lane: str) -> None:
    """Row addresses of a row-major matrix."""
    b, count = frame.b, min(rows.count, frame.level.lanes // 2)

    def some(first: Index) -> None:
        at = b.address(start, b.multiply(first, rows.length), lane)
        steps = ", ".join(f"i64 {i * rows.length}" for i in range(count))
        type_ = vector(count, "ptr")
        addresses = b.emit(f"getelementptr {lane}, {at.typed}, <{count} x i64> <{steps}>", type_)
        b.store(addresses, b.address(pointers, first, "ptr"))

    b.repeat(rows.count, count, some)


def _window(rank: int, batch: tuple[Index, ...], dim: int, base: Index, extent: int) -> Window:
    window = Window((0,) * rank, (1,) * rank)
    if batch:
        window = window.replace(0, batch[0], 1)
    return window.replace(dim, base, extent)


def _rows_of_load(
    frame: Frame, load: Op, rows: Rows, batch: tuple[Index, ...], *, row: int, along: int
) -> None:
    b, address, rank = frame.b, load.operands[0], len(load.result.type.dims)
    count = min(rows.count, frame.level.lanes)
    size = BYTES[load.result.type.llvm]
    whole = _flag(frame)
    if len(load.operands) > 1:
        _lower_flag(frame, whole, all_true(frame, load.operands[1]))
    may_wrap = not stays_even(frame, address, along, batch)

    def some(first: Index) -> None:
        with frame.scope():
            window = _window(rank, batch, row, first, count)
            addresses = evaluate_vector(frame, address, window)
            b.store(addresses, b.address(rows.pointers, first, "ptr"))
            if may_wrap:
                ends = evaluate_vector(frame, address, window.replace(along, rows.length - 1, 1))
                first_byte, last_byte = b.cast("ptrtoint", addresses, "i64"), b.cast("ptrtoint", ends, "i64")
                reach = constant((rows.length - 1) * size, "i64", addresses.lanes)
                right = b.compare("icmp eq", b.op("sub", last_byte, first_byte), reach)
                _lower_flag(frame, whole, _all_lanes(frame, right))

    b.repeat(rows.count, count, some)
    if len(load.operands) > 1 or may_wrap:
        b.choose(
            b.load("i1", whole),
            lambda: None,
            lambda: _copy_rows(frame, load.result, rows, batch, row=row, along=along),
            likely=True,
        )


def stays_even(frame: Frame, address: Value, along: int, batch: tuple[Index, ...] = ()) -> bool:
    """Whether addresses along a dimension are known to be evenly spaced, whatever numbers they are made of."""
    dims = address.type.dims
    with frame.scope():
        lanes = min(dims[along], frame.level.lanes)
        probe = evaluate(frame, address, _window(len(dims), batch, along, 0, lanes))
    return isinstance(probe, Uniform) or (isinstance(probe, Ramp) and not probe.guards)


def _copy_rows(
    frame: Frame, value: Value, rows: Rows, batch: tuple[Index, ...], *, row: int, along: int
) -> None:
    b, lane, rank = frame.b, value.type.llvm, len(value.type.dims)
    buffer = frame.allocate(lane, rows.count * rows.length)
    lanes = min(rows.length, 2 * frame.level.lanes if BYTES[lane] <= 2 else frame.level.lanes)

    def one(number: Index) -> None:
        line = b.address(buffer, b.multiply(number, rows.length), lane)

        def some(first: Index) -> None:
            with frame.scope():
                window = _window(rank, batch, along, first, lanes).replace(row, number, 1)
                b.store(evaluate_vector(frame, value, window), b.address(line, first, lane))

        b.repeat(rows.length, lanes, some)

    b.repeat(rows.count, 1, one)
    _point(frame, rows.pointers, buffer, rows, lane)


def _flag(frame: Frame) -> V:
    flag = frame.b.allocate("i1", 1)
    frame.b.store(constant(True, "i8"), flag)
    return flag


def _lower_flag(frame: Frame, flag: V, condition: V) -> None:
    frame.b.store(frame.b.op("and", frame.b.load("i1", flag), condition), flag)


def _all_lanes(frame: Frame, condition: V) -> V:
    return frame.b.intrinsic("llvm.vector.reduce.and", "i1", condition) if condition.lanes else condition


_SAME_ELEMENTS = ("tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape")


def all_true(frame: Frame, value: Value) -> V:
    """Whether every element of a tile of truth values holds; without a look at what is only repeated."""
    op, tile = value.op, frame.tiles.get(value)
    if not value.type.is_tensor:
        return frame.scalars[value]
    if op is not None and isinstance(tile, Inline):
        if op.name in ("tt.splat", "arith.constant"):
            return frame.scalars[value if op.name == "arith.constant" else op.operands[0]]
        if op.name in _SAME_ELEMENTS:
            return all_true(frame, op.operands[0])
        if op.name == "arith.andi":
            a, b = (all_true(frame, operand) for operand in op.operands)
            return frame.b.op("and", a, b)
    flag = _flag(frame)
    windows(
        frame,
        value.type.dims,
        lambda window: _lower_flag(frame, flag, _all_lanes(frame, evaluate_vector(frame, value, window))),
    )
    return frame.b.load("i1", flag)


def _unsupported(frame: Frame, op: Op) -> None:
    raise UnsupportedError(f"op {op.name}", hint="scale the operands and use tl.dot")


RULES: dict[str, Rule] = {"tt.dot": _dot, "tt.dot_scaled": _unsupported}
