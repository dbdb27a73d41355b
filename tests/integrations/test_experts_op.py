"""The ops of the routed experts: numbers against float64, and all that torch asks of an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

import moecc.integrations.experts_op  # noqa: E402, F401 - registers the ops


EXPERTS, TOP_K, HIDDEN, INNER = 6, 3, 24, 20
GATED = ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu", "clamped_swiglu")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
ALPHA, LIMIT = 1.702, 0.9
# (transposed, interleaved, bias)
LAYOUTS = {
    "natural": (False, False, False),
    "bias": (False, False, True),
    "transposed": (True, False, False),
    "gpt_oss": (True, True, True),
    "interleaved": (False, True, False),
}


def arguments(
    tokens: int, kind: str = "silu_glu", layout: str = "natural", dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Of `moecc::experts`, drawn anew."""
    transposed, interleaved, has_bias = LAYOUTS[layout]
    outputs = 2 * INNER if kind.endswith("glu") else INNER
    gate_up, down = torch.randn(EXPERTS, outputs, HIDDEN) / 4, torch.randn(EXPERTS, HIDDEN, INNER) / 4
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [torch.randn(EXPERTS, outputs), torch.randn(EXPERTS, HIDDEN)] if has_bias else []
    weights, ids = torch.rand(tokens, EXPERTS).topk(TOP_K, dim=1)
    tensors = [torch.randn(tokens, HIDDEN), ids, weights, gate_up, down, *biases]
    tensors = [t if t is ids or t is weights else t.to(dtype) for t in tensors]
    tensors += [None] * (7 - len(tensors))
    return (*tensors, kind, ALPHA, LIMIT, transposed, interleaved)


def reference(
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    """The definition in float64, all experts on all tokens; differentiable."""
    x, topk_weights, gate_up, down = (t.double() for t in (x, topk_weights, gate_up, down))
    if not transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    pre = x @ gate_up
    if gate_up_bias is not None:
        pre = pre + gate_up_bias.double()[:, None]
    out = activate(pre, kind, alpha, limit, interleaved) @ down
    if down_bias is not None:
        out = out + down_bias.double()[:, None]
    chosen = functional.one_hot(ids.clamp(-1, len(gate_up)) + 1, len(gate_up) + 2).double()[..., 1:-1]
    return torch.einsum("tke,tk,eth->th", chosen, topk_weights, out)


def activate(pre: Tensor, kind: str, alpha: float, limit: float, interleaved: bool) -> Tensor:
    if not kind.endswith("glu"):
        return FUNCTIONS[kind](pre)
    gate, up = (pre[..., ::2], pre[..., 1::2]) if interleaved else pre.chunk(2, -1)
    if kind == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    return FUNCTIONS[kind.removesuffix("_glu")](gate) * up


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def leaves(call: tuple[Any, ...]) -> list[Tensor]:
    return [value for value in call if isinstance(value, Tensor) and value.is_floating_point()]


def gradients(function: Any, call: tuple[Any, ...], direction: Tensor) -> list[Tensor]:
    """Of all float tensors of the call."""
    fresh = tuple(
        v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in call
    )
    out = function(*fresh)
    return list(torch.autograd.grad(out, leaves(fresh), direction.to(out.dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", GATED + UNGATED)
def test_forward_and_gradients_are_those_of_the_definition(kind: str, layout: str) -> None:
    if kind in UNGATED and LAYOUTS[layout][1]:
        pytest.skip("without a gate nothing alternates")
    call = arguments(13, kind, layout)
    call[1][2, 1], call[1][5] = EXPERTS, -1
    assert relative(torch.ops.moecc.experts(*call), reference(*call)) < 1e-6
    direction = torch.randn(13, HIDDEN)
    expected = gradients(reference, call, direction)
    for recompute in (False, True):
        found = gradients(torch.ops.moecc.experts, (*call, recompute), direction)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) < 1e-5
