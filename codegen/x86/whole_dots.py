"""A loop over blocks of k that only loads and multiplies, as dots over all of k.

Accumulators then stay in registers for the whole sum, and each operand is packed once.
"""

from __future__ import annotations

from moecc.codegen.x86.builder import V
from moecc.codegen.x86.dot_shape import DotPlan
from moecc.codegen.x86.dots import (
    accumulates_in_place,
    dot_plan,
    finished_product,
    stays_even,
)
from moecc.codegen.x86.steps import Shift, constant_of, shift_of, step
from moecc.codegen.x86.tiles import Frame, Inline, Shifted
from moecc.codegen.x86.tree import Op, Value

CACHED_BYTES = 1 << 20
"""Of a packed operand, half of a second cache."""

_PLAIN = frozenset({"tt.load", "tt.addptr", "tt.dot", "tt.splat", "arith.constant", "scf.yield"})


def whole_dots(frame: Frame, loop: Op) -> bool:
    """Lower the loop as one product for each dot in it, where it is such a loop; say whether it was.

    The number of rounds is known, sums are not rounded between them, every dot adds to what the loop carries for it
    alone, and its operands are loads without mask whose addresses move on by just their block of k: the rows then
    lie on in memory. The smaller operand, packed, stays in the cache.
    """
    rounds = _rounds(loop)
    counter, *arguments = loop.body().arguments
    if rounds < 2 or counter.users or any(op.name not in _PLAIN for op in loop.body().ops):
        return False
    shifts: dict[Value, Shift] = {}
    dots: list[tuple[int, Op]] = []
    for i, argument in enumerate(arguments):
        shift, dot = shift_of(argument), accumulates_in_place(argument, loop.body().terminator.operands[i])
        if shift is not None:
            shifts[argument] = shift
        elif dot is not None:
            dots.append((i, dot))
        else:
            return False
    loads = {operand for _, dot in dots for operand in dot.operands[:2]}
    if any(dot_plan(frame, dot).shape.rounds for _, dot in dots):
        return False
    if not all(
        _divides(frame, dot, rounds) and _fits(dot_plan(frame, dot, rounds=rounds)) for _, dot in dots
    ):
        return False
    if len(dots) != sum(op.name == "tt.dot" for op in loop.body().ops) or not dots:
        return False
    for argument, shift in shifts.items():
        frame.tiles[argument] = Shifted(shift.initial, V("0", "i64"))
    if not all(_moves_on(frame, dot, side, shifts) for _, dot in dots for side in (0, 1)):
        return False
    if any(op.name == "tt.load" and op.result not in loads for op in loop.body().ops):
        return False
    _multiply_all(frame, loop, dots, rounds)
    for i, argument in enumerate(arguments):
        if argument in shifts:
            by = constant_of(shifts[argument].increment)
            assert by is not None
            frame.tiles[loop.results[i]] = Shifted(shifts[argument].initial, V(str(rounds * by), "i64"))
    return True


def _divides(frame: Frame, dot: Op, rounds: int) -> bool:
    """Whether all of k is whole steps of any plan: a power of two, as tiles are, or blocks of two vectors."""
    k = dot.operands[0].type.dims[-1]
    return rounds & (rounds - 1) == 0 or k % (2 * frame.level.lanes) == 0


def _fits(plan: DotPlan) -> bool:
    """The operand that all rows of the other one pass by."""
    return min(plan.a_bytes, plan.b_bytes) <= CACHED_BYTES


def _rounds(loop: Op) -> int:
    """0 if it is not known."""
    bounds = [constant_of(operand) for operand in loop.operands[:3]]
    low, high, by = bounds
    return 0 if low is None or high is None or not by else max(0, -(-(high - low) // by))


def _moves_on(frame: Frame, dot: Op, side: int, shifts: dict[Value, Shift]) -> bool:
    """The operand is a load whose rows run along k and continue where the last round's ended."""
    value, k = dot.operands[side], 1 - side
    load = value.op
    if load is None or load.name != "tt.load" or len(load.operands) != 1 or value in frame.plan.stored:
        return False
    address = load.operands[0]
    size = value.type.dims[k]
    if len(value.type.dims) != 2 or address not in shifts or step(address, k) != 1:
        return False
    return constant_of(shifts[address].increment) == size and stays_even(frame, address, k)


def _multiply_all(frame: Frame, loop: Op, dots: list[tuple[int, Op]], rounds: int) -> None:
    outer, frame.packed = frame.packed, {}
    for op in loop.body().ops:
        if op.name == "tt.load":
            frame.tiles[op.result] = Inline(op)
    for i, dot in dots:
        plan = dot_plan(frame, dot, rounds=rounds)
        frame.tiles[loop.results[i]] = finished_product(frame, dot, plan, loop.operands[3 + i])
    frame.packed = outer
