"""tl.device_assert and tl.device_print."""

from __future__ import annotations

import pytest
import torch
from compiled import KernelError, Process

from moecc.codegen.x86.features import supported_levels

LEVELS = supported_levels()


@pytest.mark.parametrize("shape", [(1,), (16,), (8, 64)])
@pytest.mark.parametrize("level", LEVELS)
def test_an_element_that_fails(collective: Process, level: str, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    collective("check", level, x, -1.0, S=shape, debug=True)
    x.view(-1)[-1] = -5.0
    with pytest.raises(KernelError) as error:
        collective("check", level, x, -1.0, S=shape, debug=True)
    text = str(error.value)
    assert text.startswith("RuntimeError: check: ")
    assert "collective_kernels.py:" in text
    assert 'assertion failed: x "must"\nnot be small: 100% \\ é' in text


@pytest.mark.parametrize("level", LEVELS)
def test_a_scalar_that_fails_and_tells_its_program(collective: Process, level: str) -> None:
    collective("check_one", level, 4, debug=True)
    with pytest.raises(KernelError, match="n is small, in program"):
        collective("check_one", level, 3, debug=True, grid=(2, 2))


def test_without_debug_nothing_is_checked(collective: Process) -> None:
    collective("check_one", LEVELS[-1], 3)


@pytest.mark.parametrize("level", LEVELS)
def test_print(collective: Process, level: str) -> None:
    x = torch.tensor([[1.5, -2.0], [float("inf"), 0.25]])
    lines = collective("show", level, x, -3, S=(2, 2), HEX=False).printed.splitlines()
    values = ["1.500000", "-2.000000", "inf", "0.250000"]
    places = [f"pid (0, 0, 0) idx ({i}, {j})" for i in range(2) for j in range(2)]
    assert lines[:4] == [f"{place} tile: {value}" for place, value in zip(places, values, strict=True)]
    assert lines[4] == "pid (0, 0, 0) idx () tile: -3"
    assert lines[5].startswith("pid (0, 0, 0) done")
    assert len(lines) == 6


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bfloat16, torch.bool])
def test_print_of_bits(collective: Process, dtype: torch.dtype) -> None:
    x = torch.tensor([1, 0]).to(dtype) if dtype == torch.bool else torch.tensor([1, 120]).to(dtype)
    lines = collective("show", LEVELS[-1], x, 255, S=(2,), HEX=True).printed.splitlines()
    for line, item in zip(lines, x, strict=False):
        size = item.element_size()
        bits = int.from_bytes(bytes(item.reshape(1).view(torch.uint8).tolist()), "little")
        assert line.endswith(f": 0x{bits:0{2 * size}x}")
    assert lines[2].endswith(": 0x000000ff")
