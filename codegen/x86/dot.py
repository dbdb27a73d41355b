"""The style of every tl.dot: AMX tiles where the CPU has them and they take the elements, else vectors.

Tiles are no slower for one row of A than vectors are: either waits for the memory that B streams from."""

from __future__ import annotations

from moecc.codegen.x86.amx import plan_tiles
from moecc.codegen.x86.dot_shape import DotPlan, DotShape, Over
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import Level
from moecc.codegen.x86.fma import OuterPlan, VectorPlan
from moecc.codegen.x86.inner import InnerPlan
from moecc.codegen.x86.outer_pairs import OuterPairsPlan

INNER_ROWS = 8
"""Up to as many rows of A the sums run along k where bfloats have to be widened."""

_FLOATS = ("bf16", "f16", "f32", "f8E4M3FN", "f8E5M2")


def plan_dot(shape: DotShape, level: Level, *, a_over: Over, b_over: Over) -> DotPlan:
    """How to compute a dot whose operands' rows run so: over "outer", m or n, with k contiguous, or over "k".

    An operand that lies in no memory may be stored either way; k contiguous suits best. Raises UnsupportedError for
    elements that no dot takes.
    """
    _check_elements(shape)
    tiles = plan_tiles(shape, a_over=a_over, b_over=b_over) if level.amx else None
    if tiles is not None:
        return tiles
    style, pairs = _vector_style(shape, level, a_over, b_over)
    return style(shape=shape, a_over=a_over, b_over=b_over, vector_bytes=level.vector_bytes, pairs=pairs)


def _vector_style(shape: DotShape, level: Level, a_over: Over, b_over: Over) -> tuple[type[VectorPlan], bool]:
    """The plan, and whether it multiplies bfloats in pairs."""
    pairs = level.pairs and shape.a == shape.b == "bf16" and shape.lane == "float"
    lanes, contiguous = level.lanes, a_over == b_over == "outer"
    if pairs and contiguous and shape.k % (2 * lanes) == 0:
        return InnerPlan, True
    if pairs and b_over == "k" and shape.n >= lanes and shape.k % 2 == 0:
        return OuterPairsPlan, True
    return (InnerPlan if contiguous and shape.m <= INNER_ROWS else OuterPlan), False


def _check_elements(shape: DotShape) -> None:
    integers = shape.a == shape.b == "i8" and shape.accumulator == "i32"
    doubles = shape.a == shape.b == shape.accumulator == "f64"
    floats = {shape.a, shape.b} <= set(_FLOATS) and shape.accumulator in ("f32", "f16")
    if not (integers or doubles or floats):
        raise UnsupportedError(
            f"a dot of {shape.a} by {shape.b} into {shape.accumulator}",
            hint="floats add in fp32 (or out_dtype fp16), fp64 in fp64, int8 in int32",
        )
