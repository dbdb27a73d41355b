"""Pieces of packing: elements widened exactly, and squares of lanes transposed."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.codegen.x86.builder import Builder, Index, V, constant, vector
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.types import BYTES, LLVM_TYPES

_MINIFLOAT = {"f8E4M3FN": 7, "f8E5M2": 8}
"""Bits by which an 8-bit float moves up to be a half, whose exponent is as wide or one bit wider."""


def element_bytes(element: str) -> int:
    return BYTES[LLVM_TYPES[element]]


def row_pointers(b: Builder, pointers: V, first: Index, count: int, rows: int) -> list[V]:
    """`rows` addresses from `first` on; past the last of `count` the last is repeated."""
    return [
        b.load("ptr", b.address(pointers, b.add(first, min(row, count - 1)), "ptr")) for row in range(rows)
    ]


def widen(b: Builder, pointer: V, lanes: int, element: str, lane: str) -> V:
    """Load elements as float, double or i32 lanes, without loss."""
    if element in _MINIFLOAT:
        return b.cast("fpext", _widen_minifloat(b, pointer, lanes, element), lane)
    if element == "bf16":
        return b.cast("fpext", _widen_bfloat(b, pointer, lanes), lane)
    value = b.load(vector(lanes, LLVM_TYPES[element]), pointer)
    if value.lane_type == lane:
        return value
    if lane == "i32":
        return b.cast("sext", value, lane)
    if element in ("f16", "f32"):
        return b.cast("fpext", value, lane)
    raise UnsupportedError(f"a dot that adds {element} products in {lane}")


def _widen_bfloat(b: Builder, pointer: V, lanes: int) -> V:
    wide = b.cast("zext", b.load(vector(lanes, "i16"), pointer), "i32")
    return b.cast("bitcast", b.op("shl", wide, constant(16, "i32", lanes)), "float")


def _widen_minifloat(b: Builder, pointer: V, lanes: int, element: str) -> V:
    """Through half: f8E5M2 is its upper byte; f8E4M3FN is 2^8 times a half, but for the NaN."""
    bits = b.cast("zext", b.load(vector(lanes, "i8"), pointer), "i16")
    if element == "f8E5M2":
        half = b.op("shl", bits, constant(_MINIFLOAT[element], "i16", lanes))
        return b.cast("fpext", b.cast("bitcast", half, "half"), "float")
    magnitude = b.op("and", bits, constant(0x7F, "i16", lanes))
    sign = b.op("shl", b.op("and", bits, constant(0x80, "i16", lanes)), constant(8, "i16", lanes))
    half = b.op("or", sign, b.op("shl", magnitude, constant(_MINIFLOAT[element], "i16", lanes)))
    scaled = b.cast("fpext", b.cast("bitcast", half, "half"), "float")
    number = b.op("fmul", scaled, constant(256.0, "float", lanes))
    nan = b.compare("icmp eq", magnitude, constant(0x7F, "i16", lanes))
    return b.select(nan, constant(float("nan"), "float", lanes), number)


def widen_halves(b: Builder, pointer: V, lanes: int) -> list[V]:
    """2 * lanes bfloats as two vectors of float, the even elements and the odd: two cheap operations."""
    pairs = b.load(vector(lanes, "i32"), pointer, align=2)
    even = b.op("shl", pairs, constant(16, "i32", lanes))
    odd = b.op("and", pairs, constant(-65536, "i32", lanes))
    return [b.cast("bitcast", half, "float") for half in (even, odd)]


def bfloat_bits(b: Builder, pointer: V, lanes: int, element: str) -> V:
    """Elements as the bits of bfloats; an 8-bit float is one exactly."""
    if element == "bf16":
        return b.load(vector(lanes, "i16"), pointer)
    wide = b.cast("bitcast", widen(b, pointer, lanes, element, "float"), "i32")
    return b.cast("trunc", b.op("lshr", wide, constant(16, "i32", lanes)), "i16")


def transpose(b: Builder, rows: Sequence[V], lane: str) -> list[V]:
    """The columns of a square in memory: `rows` are its row addresses, one for each lane of a vector.

    128-bit pieces of the rows are gathered by loads, which leaves only the steps within those pieces to the one port
    that shuffles: half of a transposition. Rows a power of two apart share a cache set: a few are read at a time.
    """
    lanes, piece = len(rows), min(len(rows), 16 // BYTES[lane])
    columns = range(0, lanes, piece)
    gathered = [
        [
            _gather(b, [b.address(row, column, lane) for row in rows[i::piece]], piece, lane)
            for column in columns
        ]
        for i in range(piece)
    ]
    return [
        line
        for part in range(len(columns))
        for line in _transpose_pieces(b, [g[part] for g in gathered], piece)
    ]


def _gather(b: Builder, places: Sequence[V], piece: int, lane: str) -> V:
    """The pieces at these places, side by side."""
    parts = [b.load(vector(piece, lane), place) for place in places]
    while len(parts) > 1:
        parts = [
            b.shuffle(left, right, range(2 * left.lanes))
            for left, right in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _transpose_pieces(b: Builder, rows: Sequence[V], piece: int) -> list[V]:
    """Transpose within every piece: log2(piece) rounds that interleave the first half of the rows with the second."""
    current, half = list(rows), piece // 2
    for _ in range(piece.bit_length() - 1):
        current = [
            _interleave(b, low, high, piece, side)
            for low, high in zip(current[:half], current[half:], strict=True)
            for side in (0, 1)
        ]
    return current


def _interleave(b: Builder, low: V, high: V, piece: int, side: int) -> V:
    """The lower (side 0) or upper halves of every piece, lane by lane."""
    lanes = low.lanes
    picks = [
        base + side * piece // 2 + i + of
        for base in range(0, lanes, piece)
        for i in range(piece // 2)
        for of in (0, lanes)
    ]
    return b.shuffle(low, high, picks)
