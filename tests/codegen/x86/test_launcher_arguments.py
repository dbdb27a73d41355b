"""Python objects -> the slots that a kernel reads, bit for bit."""

from __future__ import annotations

import math
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecc.codegen.x86.signature import Signature, expander

sys.path.insert(0, str(Path(__file__).parent))
from launcher_harness import Launch


def slots_of(count: int, types: dict[str, Signature], *values: Any) -> list[int]:
    """What a kernel reads beyond its first argument, as unsigned integers."""
    out = torch.full((count + 1,), -1, dtype=torch.int64)
    out[0] = count
    Launch("copy_slots", out="*i64", **types)((1,), out, *values)
    return [slot % 2**64 for slot in out[1:].tolist()]


INTEGERS = [(f"{sign}{bits}", bits, sign == "i") for sign in "iu" for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize(("type_", "bits", "signed"), INTEGERS)
@given(data=st.data())
def test_integers(type_: str, bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    value = data.draw(st.one_of(st.integers(low, high), st.sampled_from([low, high])))
    assert slots_of(1, {"n": type_}, value) == [value % 2**64]
    outside = data.draw(st.one_of(st.integers(max_value=low - 1), st.integers(min_value=high + 1)))
    with pytest.raises(OverflowError, match=f"^argument 'n' is {outside}, which does not fit {type_}$"):
        slots_of(1, {"n": type_}, outside)


@pytest.mark.parametrize(("value", "slot"), [(True, 1), (False, 0), (7, 1), (0, 0)])
@pytest.mark.parametrize("type_", ["i1", "u1"])
def test_truth_values(type_: str, value: Any, slot: int) -> None:
    assert slots_of(1, {"b": type_}, value) == [slot]


def nearest(value: float, mantissa: int, least: int) -> int:
    """The bits of the 16-bit float nearest to value, ties to even, by comparing exact numbers."""
    bias = 1 - least

    def number(bits: int) -> Fraction:
        exponent, fraction = bits >> mantissa, bits & (2**mantissa - 1)
        scale = Fraction(2) ** (max(exponent, 1) - bias - mantissa)
        return (fraction + (2**mantissa if exponent else 0)) * scale

    infinity = (2 * bias + 1) << mantissa
    low, high = 0, infinity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if number(middle) <= Fraction(abs(value)) else (low, middle)
    below, above = Fraction(abs(value)) - number(low), number(high) - Fraction(abs(value))
    bits = low if below < above or (below == above and low % 2 == 0) else high
    return bits | (0x8000 if math.copysign(1, value) < 0 else 0)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(width=16, allow_nan=False, allow_infinity=False)
)
def test_floats_round_to_nearest_even(value: float) -> None:
    half, brain = slots_of(2, {"h": "fp16", "b": "bf16"}, value, value)
    assert half == nearest(value, 10, -14)
    assert brain == nearest(value, 7, -126)
    single, double = slots_of(2, {"s": "fp32", "d": "fp64"}, value, value)
    assert struct.pack("<I", single) == torch.tensor([value], dtype=torch.float64).float().numpy().tobytes()
    assert struct.pack("<Q", double) == struct.pack("<d", value)


@given(steps=st.integers(0, 2 * 0x7C00 - 1))
def test_ties_of_half_precision(steps: int) -> None:
    low, high = (
        struct.unpack("<e", struct.pack("<H", bits))[0] for bits in (steps // 2, min(steps // 2 + 1, 0x7BFF))
    )
    value = (low + high) / 2
    assert slots_of(1, {"h": "fp16"}, value) == [nearest(value, 10, -14)]


@pytest.mark.parametrize(("type_", "infinity"), [("fp16", 0x7C00), ("bf16", 0x7F80), ("fp32", 0x7F800000)])
def test_special_floats(type_: str, infinity: int) -> None:
    sign = 1 << (31 if type_ == "fp32" else 15)
    assert slots_of(3, {"a": type_, "b": type_, "c": type_}, math.inf, -math.inf, -0.0) == [
        infinity,
        infinity | sign,
        sign,
    ]
    (nan,) = slots_of(1, {"a": type_}, math.nan)
    assert nan & infinity == infinity
    assert nan & (infinity & -infinity) - 1


def test_integers_are_floats_too() -> None:
    assert slots_of(1, {"x": "fp32"}, 3) == [struct.unpack("<I", struct.pack("<f", 3.0))[0]]


class Address:
    """An object with no more than a tensor's address."""

    def data_ptr(self) -> int:
        return 2**64 - 16


def test_pointers() -> None:
    tensor = torch.zeros(3)
    types: dict[str, Signature] = dict.fromkeys("abcd", "*fp32")
    assert slots_of(4, types, tensor[1:], None, Address(), 4096) == [
        tensor.data_ptr() + 4,
        0,
        2**64 - 16,
        4096,
    ]


def test_constants_fill_no_slot_and_tuples_one_for_each_item() -> None:
    types: dict[str, Signature] = {"c": "constexpr", "t": ("i32", "constexpr", ("i64", "i1")), "n": "i8"}
    assert slots_of(4, types, "ignored", (5, None, (-1, True)), 9) == [5, 2**64 - 1, 1, 9]


def test_descriptors_become_their_parts() -> None:
    class Descriptor:
        base, shape, strides = Address(), [5, 7], [8, 1]

    signature: Signature = ("i32", ("tensordesc<fp16[16, 32]>",))
    expand = expander(signature, lambda _: (True, False))
    assert expand is not None
    values = expand((3, (Descriptor(),)))
    slots = slots_of(12, {"n": "i32", "d": signature[1]}, *values)
    assert slots == [3, 2**64 - 16, 5, 7, 8, 1, 1, 0, 5, 7, 8, 1]
    assert expander(("i32", "*fp32", ("i64",)), lambda _: ()) is None


@pytest.mark.parametrize(
    ("type_", "value", "message"),
    [
        ("*fp32", "text", r"^argument 'x' must be a tensor \(it has no data_ptr\), not str$"),
        (
            "*fp32",
            torch.empty(2, device="meta"),
            r"^argument 'x' is a tensor on meta; this backend runs on the CPU's$",
        ),
        ("i32", 1.5, r"^argument 'x' must be an integer, not float$"),
        ("i64", None, r"^argument 'x' must be an integer, not NoneType$"),
        ("fp32", "1", r"^argument 'x' must be a float, not str$"),
        (("i32", "i32"), (1,), r"^argument 'x' must be a tuple of 2 items$"),
        (("i32", "fp16"), (1, []), r"^argument 'x\[1\]' must be a float, not list$"),
    ],
)
def test_wrong_arguments_are_named(type_: Signature, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        slots_of(1, {"x": type_}, value)


def test_a_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match="copy_slots: 1 arguments for a kernel of 2"):
        Launch("copy_slots", out="*i64", n="i32")((1,), None)


def test_more_slots_than_fit_the_stack() -> None:
    types: dict[str, Signature] = {f"n{i}": "i64" for i in range(100)}
    assert slots_of(100, types, *range(100)) == list(range(100))
