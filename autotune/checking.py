"""Whether two results are one but for rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
"""Root-mean-square difference, relative, that rounding in another order explains."""


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of norms, in double precision; not a number where `found` holds one that is none."""
    exact = expected.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))
