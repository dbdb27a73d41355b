"""How an integer or pointer tile moves along a dimension, and the range of an integer, read off the tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.codegen.x86.tree import Op, Value
from moecc.codegen.x86.types import Type

Range = tuple[int, int]


def step(value: Value, dim: int) -> int | None:
    """The constant difference of neighbours along dim, pointers in elements; None if there is none that is known.

    Integers count modulo their width: an extension counts as if it did not wrap, which its user has to guard.
    """
    op = value.op
    if not value.type.is_tensor or value.type.dims[dim] == 1:
        return 0
    if op is None:
        carried = shift_of(value)
        return step(carried.initial, dim) if carried else None
    rule = _STEPS.get(op.name)
    return rule(op, dim) if rule else _uniform(op, dim)


def _uniform(op: Op, dim: int) -> int | None:
    """0 for an op that works element by element on operands that do not change along dim."""
    if op.name.partition(".")[0] not in ("arith", "math") or not op.operands:
        return None
    return 0 if all(step(operand, dim) == 0 for operand in op.operands) else None


def _constant(op: Op, dim: int) -> int | None:
    return 0 if splat_text(op) is not None else None


def _sum(op: Op, dim: int, sign: int = 1) -> int | None:
    a, b = (step(operand, dim) for operand in op.operands)
    return None if a is None or b is None else a + sign * b


def _product(op: Op, dim: int) -> int | None:
    a, b = (step(operand, dim) for operand in op.operands)
    if a == 0 and b == 0:
        return 0
    for moving, factor in ((a, constant_of(op.operands[1])), (b, constant_of(op.operands[0]))):
        if moving is not None and factor is not None:
            return moving * factor
    return None


def _broadcast(op: Op, dim: int) -> int | None:
    source = op.operands[0]
    return 0 if source.type.dims[dim] == 1 else step(source, dim)


def _expand(op: Op, dim: int) -> int | None:
    axis = op.integer("axis")
    return 0 if dim == axis else step(op.operands[0], dim - (dim > axis))


_STEPS: dict[str, Callable[[Op, int], int | None]] = {
    "arith.constant": _constant,
    "tt.splat": lambda op, dim: 0,
    "tt.make_range": lambda op, dim: 1,
    "tt.addptr": _sum,
    "arith.addi": _sum,
    "arith.subi": lambda op, dim: _sum(op, dim, -1),
    "arith.muli": _product,
    "arith.extsi": lambda op, dim: step(op.operands[0], dim),
    "arith.extui": lambda op, dim: step(op.operands[0], dim),
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand,
    "tt.trans": lambda op, dim: step(op.operands[0], op.integers("order")[dim]),
}


def splat_text(op: Op) -> str | None:
    """The one number of a constant, as it is written; None for a constant of several."""
    text = str(op.attributes["value"])
    if text.startswith("dense<"):
        text = text[len("dense<") : text.rindex("> :")]
        return None if text.startswith(("[", '"')) else text
    return text.partition(" : ")[0]


def constant_of(value: Value) -> int | None:
    """The integer that a scalar or every element of a tile is known to be."""
    op = value.op
    if op is None:
        return None
    if op.name == "arith.constant" and not value.type.is_float:
        return integer(splat_text(op))
    if op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
        return constant_of(op.operands[0])
    return None


def integer(text: str | None) -> int | None:
    """What an integer or truth value is written as; None for anything else."""
    if text in ("True", "true", "False", "false"):
        return int(text.lower() == "true")
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


@dataclass(frozen=True)
class Shift:
    """A tile that a loop carries and changes only by adding one number to every element."""

    initial: Value
    update: Op
    increment: Value


def shift_of(argument: Value) -> Shift | None:
    """How the loop changes this argument of its body, if that is a shift of a tile of integers or pointers."""
    loop = next((op for op in argument.users if op.block is not None), None)
    owner = loop.block if loop else None
    while owner is not None and argument not in owner.arguments:
        owner = owner.owner.block
    if owner is None or owner.owner.name != "scf.for" or not argument.type.is_tensor:
        return None
    position = owner.arguments.index(argument) - 1
    if position < 0:
        return None
    update = owner.terminator.operands[position].op
    if update is None or update.block is not owner or update.name not in ("tt.addptr", "arith.addi"):
        return None
    operands = update.operands
    if operands[0] is not argument:
        return None
    if not _is_splat(operands[1]):
        return None
    return Shift(owner.owner.operands[3 + position], update, operands[1])


def _is_splat(value: Value) -> bool:
    op = value.op
    if op is None:
        return False
    if op.name == "arith.constant":
        return splat_text(op) is not None
    if op.name in ("tt.broadcast", "tt.expand_dims", "arith.extsi"):
        return _is_splat(op.operands[0])
    return op.name == "tt.splat"


def range_of(value: Value, depth: int = 8) -> Range:
    """Bounds, both included, of a signed integer; its type's where nothing is known."""
    full = _full(value.type)
    op = value.op
    if op is None or depth == 0:
        return _loop_range(value) or full
    number = constant_of(value)
    if number is not None:
        return number, number
    rule = _RANGES.get(op.name)
    found = rule(op, depth - 1) if rule else None
    return found if found and full[0] <= found[0] and found[1] <= full[1] else full


def _full(type_: Type) -> Range:
    bits = {"i64": 64, "i32": 32, "i16": 16, "i8": 8, "i1": 1}.get(type_.element, 64)
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _loop_range(value: Value) -> Range | None:
    """Of the counter of a loop with known bounds."""
    for user in value.users:
        block = user.block
        while block is not None and value not in block.arguments:
            block = block.owner.block
        if block is None or block.owner.name != "scf.for" or block.arguments[0] is not value:
            return None
        low, high = (range_of(bound, 2) for bound in block.owner.operands[:2])
        return low[0], max(low[0], high[1] - 1)
    return None


def _operands(op: Op, depth: int) -> list[Range]:
    return [range_of(operand, depth) for operand in op.operands]


def _add_range(op: Op, depth: int) -> Range:
    (a, b), (c, d) = _operands(op, depth)
    return a + c, b + d


def _subtract_range(op: Op, depth: int) -> Range:
    (a, b), (c, d) = _operands(op, depth)
    return a - d, b - c


def _multiply_range(op: Op, depth: int) -> Range:
    (a, b), (c, d) = _operands(op, depth)
    corners = (a * c, a * d, b * c, b * d)
    return min(corners), max(corners)


def _remainder_range(op: Op, depth: int) -> Range | None:
    (a, b), (c, d) = _operands(op, depth)
    if c <= 0:
        return None
    return (0 if a >= 0 else 1 - d), min(b, d - 1) if b >= 0 else 0


def _divide_range(op: Op, depth: int) -> Range | None:
    (a, b), (c, _) = _operands(op, depth)
    return (a // c if a < 0 else 0, b // c) if c > 0 and b >= 0 else None


_RANGES: dict[str, Callable[[Op, int], Range | None]] = {
    "tt.make_range": lambda op, depth: (op.integer("start"), op.integer("end") - 1),
    "tt.get_program_id": lambda op, depth: (0, (1 << 31) - 1),
    "tt.splat": lambda op, depth: range_of(op.operands[0], depth),
    "tt.broadcast": lambda op, depth: range_of(op.operands[0], depth),
    "tt.expand_dims": lambda op, depth: range_of(op.operands[0], depth),
    "arith.extsi": lambda op, depth: range_of(op.operands[0], depth),
    "arith.addi": _add_range,
    "arith.subi": _subtract_range,
    "arith.muli": _multiply_range,
    "arith.remsi": _remainder_range,
    "arith.divsi": _divide_range,
}
