"""More of liger-kernel's kernels, unchanged: fused ones, options, rows of several blocks, bf16."""

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
ROWS, SIZE, WORDS = 6, 200, 70_000
Function = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _on_x86() -> Iterator[None]:
    torch.manual_seed(0)
    with activated():
        yield


def liger(module: str, function: str, *rest: object) -> Function:
    """A function of liger's ops, called with tensors and then `rest`; of several results the first."""

    def first(*tensors: torch.Tensor) -> torch.Tensor:
        apply: Any = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply
        result = apply(*tensors, *rest)
        return result[0] if isinstance(result, tuple) else result

    return first


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def sparsemax(x: torch.Tensor) -> torch.Tensor:
    """Martins and Astudillo, 2016."""
    ordered = x.sort(-1, descending=True)[0]
    sums = ordered.cumsum(-1) - 1
    count = (ordered * torch.arange(1, SIZE + 1) > sums).sum(-1, keepdim=True)
    return (x - sums.gather(-1, count - 1) / count).clamp(min=0)


def jensen_shannon(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    p, q = ((a.to(x) @ b.to(x).T).log_softmax(-1) for a, b in ((x, w), TEACHER))
    middle = ((p.exp() + q.exp()) / 2).log()
    terms = (functional.kl_div(middle, log, log_target=True, reduction="sum") for log in (p, q))
    return sum(terms, torch.zeros((), dtype=x.dtype)) / 2 / ROWS


TEACHER = torch.linspace(-1, 1, ROWS * SIZE).reshape(ROWS, SIZE).cos(), torch.eye(50, SIZE)
TARGETS = torch.arange(ROWS) * 11_003 % WORDS
SOME = torch.where(torch.arange(ROWS) == 2, -100, TARGETS)
INDICES = torch.tensor([[3, 5, 3], [0, 9, 5]])
EXPECTED = torch.linspace(-2, 2, ROWS * 50).reshape(ROWS, 50).softmax(-1)
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "fused add and RMSNorm": (
        liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", 1e-6, 0.0, "llama", False),
        lambda x, r, w: rms(x + r) * w,
        [(ROWS, SIZE), (ROWS, SIZE), (SIZE,)],
    ),
    "modulated RMSNorm": (
        liger("modulated_rms_norm", "LigerModulatedRMSNormFunction", 1e-6, 0.0, "llama", False),
        lambda x, w, scale, shift: rms(x) * w * (1 + scale) + shift,
        [(ROWS, SIZE), (SIZE,), (ROWS, SIZE), (ROWS, SIZE)],
    ),
    "PolyNorm": (
        liger("poly_norm", "LigerPolyNormFunction", 1e-6, False),
        lambda x, w, b: w[0] * rms(x**3) + w[1] * rms(x**2) + w[2] * rms(x) + b,
        [(ROWS, SIZE), (3,), ()],
    ),
    "Gemma's RMSNorm": (
        liger("rms_norm", "LigerRMSNormFunction", 1e-6, 1.0, "gemma", False),
        lambda x, w: rms(x) * (1 + w),
        [(3, ROWS, SIZE), (SIZE,)],
    ),
    "sparsemax": (liger("sparsemax", "LigerSparsemaxFunction", -1), sparsemax, [(ROWS, SIZE)]),
    "softmax of long rows": (
        liger("softmax", "LigerSoftmaxFunction"),
        lambda x: x.softmax(-1),
        [(2, 50_000)],
    ),
    "embedding": (
        lambda table: liger("experimental.embedding", "LigerEmbeddingFunction", INDICES)(table),
        lambda table: functional.embedding(INDICES, table),
        [(10, SIZE)],
    ),
    "cross entropy of long rows": (
        liger("cross_entropy", "LigerCrossEntropyFunction", SOME, None, -100, 0.0, 0.0, "mean", None, False),
        lambda x: functional.cross_entropy(x, SOME),
        [(ROWS, WORDS)],
    ),
    "cross entropy, smoothed, capped": (
        liger("cross_entropy", "LigerCrossEntropyFunction", SOME, None, -100, 0.0, 0.1, "sum", 30.0, False),
        lambda x: functional.cross_entropy(
            30 * torch.tanh(x / 30), SOME, reduction="sum", label_smoothing=0.1
        ),
        [(ROWS, WORDS)],
    ),
    "fused linear JS divergence": (
        lambda x, w: liger("fused_linear_jsd", "LigerFusedLinearJSDFunction", *TEACHER)(x, w),
        jensen_shannon,
        [(ROWS, SIZE), (50, SIZE)],
    ),
    "fused linear KL divergence": (
        liger("fused_linear_kl_div", "LigerFusedLinearKLDivFunction", EXPECTED),
        lambda x, w: functional.kl_div((x @ w.T).log_softmax(-1), EXPECTED.to(x), reduction="batchmean"),
        [(ROWS, SIZE), (50, SIZE)],
    ),
}


def leaves(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


def compare(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Results and gradients, as parts of the largest number of each."""
    function, reference, sizes = CASES[name]
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    ours, exact = leaves(tensors, dtype), leaves(tensors, torch.float64)
    # Liger works in place on what it is given.
    result, right = function(*(tensor.clone() for tensor in ours)), reference(*exact)
    weight = torch.randn_like(right) if right.dim() else torch.ones_like(right)
    result.backward(weight.to(result.dtype))
    right.backward(weight)
    pairs = [(result, right), *((mine.grad, theirs.grad) for mine, theirs in zip(ours, exact, strict=True))]
    for found, expected in pairs:
        assert found is not None
        assert expected is not None
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"off by {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_liger(name: str) -> None:
    compare(name, torch.float32, 2e-5)


@pytest.mark.parametrize(
    "name", ["fused add and RMSNorm", "Gemma's RMSNorm", "softmax of long rows", "embedding"]
)
def test_liger_of_bf16(name: str) -> None:
    compare(name, torch.bfloat16, 0.03)


def test_liger_rope_backward() -> None:
    q, k = torch.randn(2, 4, 8, 32), torch.randn(2, 2, 8, 32)
    angles = torch.outer(torch.arange(8.0), 1 / 10000 ** (torch.arange(0, 32, 2) / 32))
    cos, sin = (table(torch.cat([angles, angles], -1))[None] for table in (torch.cos, torch.sin))
    ours, exact = leaves([q, k], torch.float32), leaves([q, k], torch.float64)
    apply: Any = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
    results = apply(*(tensor.clone() for tensor in ours), cos, sin)
    for found, mine, theirs in zip(results, ours, exact, strict=True):
        turned = torch.cat([-theirs[..., 16:], theirs[..., :16]], -1)
        right = theirs * cos[:, None].double() + turned * sin[:, None].double()
        weight = torch.randn_like(right)
        right.backward(weight)
        found.backward(weight.float(), retain_graph=True)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
