"""What the backend takes for a block of experts, and what it must leave: small functions, and near-misses of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

pytest.importorskip("transformers.integrations.moe")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from moecc.integrations.dynamo.rewrite import Finding, rewrite

grouped_mm = torch.ops.transformers.grouped_mm_fallback  # torch's own takes bf16 alone in a graph
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 7, 2, 5, 16, 8


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tensors() -> list[Tensor]:
    weights, ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K, dim=1)
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    return [torch.randn(TOKENS, HIDDEN), ids, weights, gate_up, down]


def rewritten(function: Callable[..., Any], *inputs: Any) -> tuple[list[Finding], Any]:
    """(what was found, what the rewritten graph computes)."""
    found: list[Finding] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(rewrite(graph))
        return graph.forward

    return found, torch.compile(function, backend=backend, fullgraph=True)(*inputs)


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return functional.silu(gate) * up


def block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = swiglu,
    order: Callable[[Tensor], Tensor] = torch.argsort,
    repeats: int = TOP_K,
    shift: int = 0,
    inverse: Callable[[Tensor], Tensor] = torch.argsort,
    sum_axis: int = 1,
) -> Tensor:
    """Written in other words than transformers': argsort twice, bincount, weights once the order is restored."""
    flat = ids.reshape(-1)
    slots = order(flat)
    ends = functional.one_hot(flat, EXPERTS).sum(0).cumsum(0).to(torch.int32)
    rows = x[(slots // repeats + shift) % len(x)]
    inner = activation(grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    out = grouped_mm(inner, down.transpose(-2, -1), offs=ends)
    out = (out * weights.reshape(-1)[slots][:, None])[inverse(slots)]
    return out.view(TOKENS, TOP_K, -1).sum(sum_axis)


def test_a_block_in_other_words_is_fused() -> None:
    inputs = tensors()
    (found,), out = rewritten(block, *inputs)
    assert found.reason is None
    torch.testing.assert_close(out, block(*inputs), rtol=1e-4, atol=1e-4)


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "slices": lambda r: functional.silu(r[:, :INNER]) * r[:, INNER:],
    "sigmoid": lambda r: r[..., :INNER] * torch.sigmoid(r[..., :INNER]) * r[..., INNER:],
    "in_place": lambda r: functional.silu(r[:, :INNER], inplace=True).mul_(r[:, INNER:]),
    "interleaved": lambda r: r[:, 1::2] * functional.silu(r[:, ::2]),
    "exact_gelu": lambda r: r[:, INNER:] * functional.gelu(r[:, :INNER]),
    "tanh_gelu": lambda r: r[:, INNER:] * functional.gelu(r[:, :INNER], approximate="tanh"),
    "clamped": lambda r: (
        (r[:, INNER:].clamp(-3, 3) + 1)
        * r[:, :INNER].clamp(max=3)
        * torch.sigmoid(1.5 * r[:, :INNER].clamp(max=3))
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_activation_is_what_it_computes(name: str) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return block(*inputs, activation=SPELLINGS[name])

    inputs = tensors()
    (found,), out = rewritten(function, *inputs)
    assert found.reason is None
    torch.testing.assert_close(out, function(*inputs), rtol=1e-4, atol=1e-4)


def gated_sums(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """The load of the experts is read outside, as by those who balance them."""
    return block(x, ids, weights, gate_up, down), functional.one_hot(ids.reshape(-1), EXPERTS).sum(0)


def test_what_follows_from_the_routing_may_be_read_outside() -> None:
    inputs = tensors()
    (found,), (out, load) = rewritten(gated_sums, *inputs)
    assert found.reason is None
    torch.testing.assert_close(out, block(*inputs), rtol=1e-4, atol=1e-4)
    assert load.sum() == TOKENS * TOP_K


def other_ends(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    slots = torch.argsort(ids.reshape(-1))
    ends = functional.one_hot(ids.reshape(-1), EXPERTS).sum(0).cumsum(0).to(torch.int32)
    inner = swiglu(grouped_mm(x[slots // TOP_K], gate_up.transpose(1, 2), offs=ends))
    out = grouped_mm(inner, down.transpose(1, 2), offs=ends.clamp(max=TOKENS * TOP_K))
    out = (out * weights.reshape(-1)[slots][:, None])[torch.argsort(slots)]
    return out.view(TOKENS, TOP_K, -1).sum(1)


def rows_read(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []

    def activation(rows: Tensor) -> Tensor:
        kept.append(swiglu(rows))
        return kept[0]

    return block(x, ids, weights, gate_up, down, activation=activation), kept[0]


def written_between(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x = x.clone()

    def activation(rows: Tensor) -> Tensor:
        x.zero_()
        return swiglu(rows)

    return block(x, ids, weights, gate_up, down, activation=activation) + x


def per_channel(rows: Tensor) -> Tensor:
    return swiglu(rows) * torch.linspace(1, 1.01, INNER)


NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "ends_of_its_own": (other_ends, "1 products share one assignment"),
    "rows_read_outside": (rows_read, "which the op does not give, is read by|has 2 readers"),
    "written_between": (written_between, "is written to by zero_"),
    "another_activation": (
        lambda *a: block(*a, activation=lambda r: torch.sin(r[:, :INNER]) * r[:, INNER:]),
        "agrees with no activation",
    ),
    "up_before_gate": (
        lambda *a: block(*a, activation=lambda r: functional.silu(r[:, INNER:]) * r[:, :INNER]),
        "agrees with no activation",
    ),
    "a_channel_of_its_own": (lambda *a: block(*a, activation=per_channel), "agrees with no activation"),
    "tokens_of_others": (lambda *a: block(*a, shift=1), "not those of the assigned tokens"),
    "tokens_counted_otherwise": (lambda *a: block(*a, repeats=3), "not those of the assigned tokens"),
    "not_sorted": (lambda *a: block(*a, order=lambda f: torch.argsort(-f)), "not sorted by expert"),
    "not_restored": (lambda *a: block(*a, inverse=lambda s: s), "do not return to the order"),
    "summed_over_tokens": (lambda *a: block(*a, sum_axis=0), "joins its rows, not a sum"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_with_the_reason_and_computes_the_same(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    inputs = tensors()
    found, out = rewritten(function, *inputs)
    assert found
    for finding in found:
        assert finding.shape is None
        assert finding.reason is not None
    assert any(re.search(reason, str(finding.reason)) for finding in found), found
    torch.testing.assert_close(out, function(*inputs))


def test_a_checkpointed_block_is_fused_inside_its_region() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = tensors()
    inputs[0].requires_grad_(True)
    (found,), out = rewritten(lambda *a: checkpoint(block, *a, use_reentrant=False), *inputs)
    assert found.reason is None
    torch.testing.assert_close(out, block(*inputs), rtol=1e-4, atol=1e-4)
