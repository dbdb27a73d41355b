"""Memory as slots: against exact integers, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.solvers.placement.capacity import Capacity


def capacity(*memory: float, expert_bytes: int = 10, layers: int = 3) -> Capacity:
    return Capacity(memory_bytes=memory, expert_bytes=expert_bytes, layers=layers)


@given(
    memory=st.lists(st.integers(1, 10**12), min_size=1, max_size=6),
    expert_bytes=st.integers(1, 10**8),
    layers=st.integers(1, 100),
    experts=st.integers(1, 300),
)
def test_slots_fit_and_one_more_does_not(
    memory: list[int], expert_bytes: int, layers: int, experts: int
) -> None:
    devices = len(memory)
    fits = min(memory) // (expert_bytes * layers)
    wanted = capacity(*map(float, memory), expert_bytes=expert_bytes, layers=layers)
    if min(fits, experts) * devices < experts:
        with pytest.raises(InputError, match="cannot hold"):
            wanted.slots_per_device(experts, devices, where="memory")
    else:
        slots = wanted.slots_per_device(experts, devices, where="memory")
        assert slots == min(fits, experts)
        assert wanted.slots_per_device(experts, devices, asked=1, where="memory") == 1


def test_what_one_byte_decides() -> None:
    assert capacity(90.0).slots_per_device(8, 4, where="m") == 3
    assert capacity(89.0).slots_per_device(8, 4, where="m") == 2
    assert capacity(1e6).slots_per_device(8, 4, where="m") == 8


@pytest.mark.parametrize(
    ("memory", "asked", "message"),
    [
        (
            (59.0,),
            None,
            "m: 5.9e-08 GB hold 1 slots of 3 layers x 1e-05 MB: 4 devices cannot hold 8 experts; hint: 2",
        ),
        (
            (60.0,),
            3,
            "3 slots per device of 3 layers x 1e-05 MB need 9e-08 GB, not 6e-08; hint: the memory holds 2",
        ),
        (
            (60.0, 60.0),
            None,
            "2 sizes of memory for 4 devices; hint: give one for all devices, or one for each",
        ),
        ((0.0,), None, "0 GB is no size of a memory"),
        ((float("nan"),), None, "nan GB is no size of a memory"),
        ((60.0, 60.0, -1.0, 60.0), None, "-1e-09 GB is no size of a memory"),
    ],
)
def test_what_cannot_be_is_refused(memory: tuple[float, ...], asked: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        capacity(*memory).slots_per_device(8, 4, asked=asked, where="m")
    assert message in str(caught.value)


def test_unknown_experts_are_refused() -> None:
    with pytest.raises(InputError, match="the size of an expert is not known; hint: give --expert-mb"):
        capacity(60.0, expert_bytes=0).slots_per_device(8, 4, where="m")
