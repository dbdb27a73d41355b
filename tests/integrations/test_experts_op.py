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

from torch._dynamo.utils import counters

import moecc.integrations.experts_pieces  # noqa: F401 - registers the ops
from moecc.errors import InputError, MoeccError

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


CASES = [(kind, "natural") for kind in GATED + UNGATED]
CASES += [("silu_glu", layout) for layout in LAYOUTS if layout != "natural"]
CASES += [("clamped_swiglu", "gpt_oss"), ("relu2", "transposed"), ("relu2", "bias")]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_forward_and_gradients_are_those_of_the_definition(kind: str, layout: str) -> None:
    call = arguments(13, kind, layout)
    call[1][2, 1], call[1][5] = EXPERTS, -1
    assert relative(torch.ops.moecc.experts(*call), reference(*call)) < 1e-6
    direction = torch.randn(13, HIDDEN)
    expected = gradients(reference, call, direction)
    for recompute in (False, True):
        found = gradients(torch.ops.moecc.experts, (*call, recompute), direction)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) < 1e-5


def test_only_wanted_gradients_are_computed() -> None:
    call = arguments(9)
    for wanted in (0, 2, 3, 4):
        leaf = call[wanted].clone().requires_grad_()
        fresh = (*call[:wanted], leaf, *call[wanted + 1 :])
        (found,) = torch.autograd.grad(torch.ops.moecc.experts(*fresh).sum(), leaf)
        (expected,) = torch.autograd.grad(reference(*fresh).sum(), leaf)
        assert relative(found, expected) < 1e-5


def test_two_runs_agree_in_every_bit() -> None:
    call, direction = arguments(33, "clamped_swiglu", "gpt_oss", torch.bfloat16), torch.randn(33, HIDDEN)
    first, second = (gradients(torch.ops.moecc.experts, call, direction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens_have_no_rows_and_zero_gradients() -> None:
    call = arguments(0)
    found = gradients(torch.ops.moecc.experts, call, torch.randn(0, HIDDEN))
    assert found[0].shape == (0, HIDDEN)
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("op", ["experts", "experts_saving"])
@pytest.mark.parametrize(("kind", "layout"), [("silu_glu", "natural"), ("clamped_swiglu", "gpt_oss")])
def test_torch_finds_the_op_whole(op: str, kind: str, layout: str) -> None:
    call = tuple(
        v.requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
        for v in arguments(5, kind, layout)
    )
    torch.library.opcheck(getattr(torch.ops.moecc, op).default, call)


def test_torch_finds_the_pieces_whole() -> None:
    x, ids, topk_weights, gate_up, down, gate_up_bias, down_bias, *_ = arguments(5, "silu", "bias")
    h = torch.randn(5 * TOP_K, INNER)
    for tensor in (x, topk_weights, gate_up, down, gate_up_bias, down_bias, h):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.moecc.combine.default, (h, ids, topk_weights, down, down_bias, False))
    torch.library.opcheck(torch.ops.moecc.project.default, (x, ids, gate_up, gate_up_bias, False))


def test_autocast_casts_as_a_matmul_does() -> None:
    call, direction = arguments(17), torch.randn(17, HIDDEN)
    expected = reference(*call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.ops.moecc.experts(*call)
        grads = gradients(torch.ops.moecc.experts, call, direction)
    assert found.dtype == torch.bfloat16
    assert 1e-4 < relative(found, expected) < 2e-2
    for ours, theirs in zip(grads, gradients(reference, call, direction), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < 3e-2


def test_a_second_derivative_is_refused() -> None:
    call = arguments(3)
    x = call[0].requires_grad_()
    (first,) = torch.autograd.grad(torch.ops.moecc.experts(*call).sum(), x, create_graph=True)
    with pytest.raises(MoeccError, match="moecc::experts: second derivatives are not known"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({7: "mish_glu"}, "moecc::experts: unknown activation 'mish_glu'; hint: known activations: silu_glu"),
        ({0: torch.randn(4, HIDDEN).double()}, "moecc::experts: x is float64; hint: known types: bfloat16"),
        ({3: torch.randn(EXPERTS, 7, HIDDEN)}, "moecc::experts: gate and up cannot share 7 outputs"),
        ({4: torch.randn(EXPERTS, HIDDEN, 3)}, r"down is \[6, 24, 3\], not \[6, 24, 20\]"),
        ({1: torch.zeros(3, TOP_K, dtype=torch.int64)}, "topk_ids"),
    ],
)
def test_wrong_arguments_are_told(change: dict[int, Any], message: str) -> None:
    call = list(arguments(4))
    for index, value in change.items():
        call[index] = value
    with pytest.raises((InputError, ValueError), match=message):
        torch.ops.moecc.experts(*call)


def test_one_graph_serves_all_numbers_of_tokens() -> None:
    counters.clear()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, *rest: Any) -> Tensor:
        return torch.ops.moecc.experts(x.sin(), *rest).cos()

    for tokens in (5, 9, 17):
        call = arguments(tokens)
        for tensor in call[:3]:
            torch._dynamo.mark_dynamic(tensor, 0)
        direction = torch.randn(tokens, HIDDEN)
        expected = gradients(lambda x, *rest: reference(x.sin(), *rest).cos(), call, direction)
        leaf = call[0].requires_grad_()
        torch._dynamo.mark_dynamic(leaf, 0)
        (found,) = torch.autograd.grad(compiled(leaf, *call[1:]), leaf, direction)
        assert relative(found, expected[0]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
