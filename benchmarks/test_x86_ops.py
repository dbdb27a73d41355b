"""The cases of x86_ops for pytest-benchmark: each side alone, not in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from x86_ops import CASES, Case


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels would be the GPU's")
@pytest.mark.parametrize("side", ["kernel", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(benchmark: Any, case: Case, side: str) -> None:
    benchmark(case.make()[side == "torch"])
