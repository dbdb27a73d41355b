"""Kernels of others, unchanged: liger-kernel's, forward and backward, on CPU tensors against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

pytest.importorskip("liger_kernel")
pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="liger-kernel looks for the GPU itself"),
]
ROWS, SIZE = 6, 200
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _on_x86() -> Iterator[None]:
    torch.manual_seed(0)
    with activated():
        yield


def liger(module: str, function: str) -> Callable[..., Any]:
    """A function of liger's ops; of several results the first."""
    apply = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply

    def first(*arguments: object) -> torch.Tensor:
        result = apply(*arguments)
        return result[0] if isinstance(result, tuple) else result

    return first


def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def divergence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, of logarithms."""
    p, q = x.exp(), y.double().exp()
    middle = ((p + q) / 2).log()
    return (q * (y.double() - middle) + p * (x - middle)).sum() / 2 / ROWS


TARGETS = torch.arange(ROWS) * 7 % 50
LOGARITHMS = torch.linspace(-2, 2, ROWS * SIZE).reshape(ROWS, SIZE).log_softmax(-1)
EVEN = torch.full((ROWS, SIZE), 1 / SIZE)
CASES: dict[
    str, tuple[Callable[[], Callable[..., Any]], Callable[..., torch.Tensor], list[tuple[int, ...]]]
] = {
    "RMSNorm": (
        lambda: lambda x, w: liger("rms_norm", "LigerRMSNormFunction")(x, w, 1e-6, 0.0, "llama", False),
        rms_norm,
        [(ROWS, SIZE), (SIZE,)],
    ),
    "LayerNorm": (
        lambda: lambda x, w, b: liger("layer_norm", "LigerLayerNormFunction")(x, w, b, 1e-6),
        lambda x, w, b: functional.layer_norm(x, (SIZE,), w, b, 1e-6),
        [(ROWS, SIZE), (SIZE,), (SIZE,)],
    ),
    "SwiGLU": (
        lambda: liger("swiglu", "LigerSiLUMulFunction"),
        lambda a, b: functional.silu(a) * b,
        [(ROWS, SIZE), (ROWS, SIZE)],
    ),
    "GeGLU": (
        lambda: liger("geglu", "LigerGELUMulFunction"),
        lambda a, b: functional.gelu(a, approximate="tanh") * b,
        [(ROWS, SIZE), (ROWS, SIZE)],
    ),
    "softmax": (
        lambda: liger("softmax", "LigerSoftmaxFunction"),
        lambda x: x.softmax(-1),
        [(ROWS, SIZE)],
    ),
    "cross entropy": (
        lambda: (
            lambda x: liger("cross_entropy", "LigerCrossEntropyFunction")(
                x, TARGETS, None, -100, 0.0, 0.0, "mean", None, False
            )
        ),
        lambda x: functional.cross_entropy(x, TARGETS),
        [(ROWS, SIZE)],
    ),
    "fused linear cross entropy": (
        lambda: (
            lambda x, w: liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")(
                x, w, TARGETS
            )
        ),
        lambda x, w: functional.cross_entropy(x @ w.T, TARGETS),
        [(ROWS, SIZE), (50, SIZE)],
    ),
    "KL divergence": (
        lambda: (
            lambda x: liger("kl_div", "LigerKLDivLossFunction")(
                x.log_softmax(-1), LOGARITHMS.exp(), "batchmean", False, 1e-10
            )
        ),
        lambda x: functional.kl_div(x.log_softmax(-1), LOGARITHMS.double().exp(), reduction="batchmean"),
        [(ROWS, SIZE)],
    ),
    "JS divergence": (
        lambda: lambda x: liger("jsd", "LigerJSDFunction")(x.log_softmax(-1), LOGARITHMS, None, 0.5, -100),
        lambda x: divergence(x.log_softmax(-1), LOGARITHMS),
        [(ROWS, SIZE)],
    ),
    "total variation": (
        lambda: lambda x: liger("tvd", "LigerTVDLossFunction")(x.softmax(-1), EVEN, None, "batchmean", -100),
        lambda x: 0.5 * (x.softmax(-1) - 1 / SIZE).abs().sum() / ROWS,
        [(ROWS, SIZE)],
    ),
    "GroupNorm": (
        lambda: lambda x, w, b: liger("group_norm", "LigerGroupNormFunction")(x, w, b, 8, 2, 1e-6),
        lambda x, w, b: functional.group_norm(x, 2, w, b, 1e-6),
        [(2, 8, 20), (8,), (8,)],
    ),
    "squared ReLU": (
        lambda: liger("relu_squared", "LigerReLUSquaredFunction"),
        lambda x: functional.relu(x) ** 2,
        [(ROWS, SIZE)],
    ),
}


def leaves(tensors: Tensors, dtype: torch.dtype) -> list[torch.Tensor]:
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", CASES)
def test_liger(name: str) -> None:
    make, reference, sizes = CASES[name]
    tensors = tuple(torch.randn(size) for size in sizes)
    ours, exact = leaves(tensors, torch.float32), leaves(tensors, torch.float64)
    # Liger works in place on what it is given.
    result, right = make()(*(tensor.clone() for tensor in ours)), reference(*exact)
    weight = torch.randn_like(right)
    result.backward(weight.to(result.dtype))
    right.backward(weight)
    torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_liger_rope() -> None:
    q, k = torch.randn(1, 4, 8, 32), torch.randn(1, 2, 8, 32)
    angles = torch.outer(torch.arange(8.0), 1 / 10000 ** (torch.arange(0, 32, 2) / 32))
    cos, sin = (table(torch.cat([angles, angles], -1))[None] for table in (torch.cos, torch.sin))
    apply = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
    for ours, x in zip(apply(q.clone(), k.clone(), cos, sin), (q, k), strict=True):
        turned = torch.cat([-x[..., 16:], x[..., :16]], -1)
        torch.testing.assert_close(ours, x * cos[:, None] + turned * sin[:, None])
