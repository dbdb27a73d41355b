"""Outputs whose memory is poisoned, inside and around, and tolerances told by a float64 reference."""

from __future__ import annotations

import torch

MARGIN = 64
"""Elements of poison on either side."""


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else 77 if dtype.itemsize == 1 else -7777


class Guarded:
    """`tensor` of that shape, all poison, in the middle of a larger one."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 2 * MARGIN,), _poison(dtype), dtype=dtype)
        self.tensor = self.whole[MARGIN : MARGIN + size].view(shape)

    def result(self) -> torch.Tensor:
        """The tensor; AssertionError where something around it was written."""
        around = torch.cat([self.whole[:MARGIN], self.whole[-MARGIN:]])
        intact = around.isnan() if around.is_floating_point() else around == _poison(around.dtype)
        assert intact.all(), "written outside"
        return self.tensor


def assert_close(found: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """The largest difference is at most `tolerance` of the largest number of the reference, and nothing is NaN."""
    assert found.shape == reference.shape
    assert not found.double().isnan().any(), "not all was written, or NaN"
    error = (found.double() - reference.double()).abs().max().item()
    scale = max(1e-30, reference.double().abs().max().item())
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of {scale:.3g}"
