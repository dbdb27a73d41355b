"""Which layers the backend lifts with their router, and which routers it must leave in the graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from test_backend_rewrite import EXPERTS, HIDDEN, INNER, TOKENS, TOP_K, block
from tiny_models import BY_COST, relative, tiny, tokens_of

import moecc
from moecc.errors import MoeccError
from moecc.integrations import block_ir
from moecc.integrations.block_ir import lowered_shape
from moecc.integrations.dynamo.rewrite import Finding, rewrite
from moecc.ir.semantics import Router
from moecc.passes.normalize import Normalize

SIGMOID = Router(score="sigmoid", selection_bias=True, normalize=True)
ROUTERS = {
    "mixtral": Router(normalize=True),
    "mixtral_gelu": Router(normalize=True),
    "qwen2_moe": Router(),
    "qwen3_moe": Router(),
    "olmoe": Router(),
    # a softmax of the selected logits is the softmax of all, normalised
    "granitemoe": Router(normalize=True),
    "gpt_oss": Router(normalize=True),
    "deepseek_v2": Router(),
    "deepseek_v3": Router(
        score="sigmoid",
        selection_bias=True,
        groups=2,
        group_score="top2_sum",
        normalize=True,
        norm_eps=1e-20,
        scale=2.5,
    ),
    "glm4_moe": Router(score="sigmoid", selection_bias=True, normalize=True, norm_eps=1e-20),
    "nemotron_h": Router(score="sigmoid", selection_bias=True, normalize=True, norm_eps=1e-20),
    "minimax_m2": SIGMOID,
    "ernie4_5_moe": Router(selection_bias=True, normalize=True, norm_min=1e-12),
    "phimoe": Router(score="sparsemixer", jitter=0.01),
    "jamba": Router(),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", BY_COST)
def test_a_familys_router_is_the_one_of_its_paper(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    found = moecc.explain(model, tokens_of(1, 6), use_cache=False)
    assert found.lifted == len(found.blocks) > 0
    for finding in found.blocks:
        assert finding.layer is not None
        assert lowered_shape(finding.layer.ir, 6).router == ROUTERS[family]
        assert finding.layer.launches == "4"


def test_a_graph_for_any_number_of_tokens_tells_the_launches_of_few_and_of_many() -> None:
    model, batch = tiny("qwen3_moe").requires_grad_(False), tokens_of(2, 6)
    torch._dynamo.mark_dynamic(batch, 1)
    found = moecc.explain(model, batch, use_cache=False)
    assert [block.layer.launches for block in found.blocks if block.layer] == ["4 to 5"] * 2


def test_where_gradients_are_wanted_the_router_stays() -> None:
    model, batch = tiny("qwen3_moe"), tokens_of(1, 6)
    training = moecc.explain(model, batch, use_cache=False)
    assert (training.fused, training.lifted) == (2, 0)
    assert "its router is left to inductor: gradients are wanted" in str(training)
    with torch.no_grad():
        assert moecc.explain(model, batch, use_cache=False).lifted == 2


def test_logits_that_a_model_gives_stay() -> None:
    model = tiny("qwen3_moe").requires_grad_(False)
    found = moecc.explain(model, tokens_of(1, 6), use_cache=False, output_router_logits=True)
    assert (found.fused, found.lifted) == (2, 0)
    assert {"which the op does not give" in str(block.router_reason) for block in found.blocks} == {True}


def test_rounded_logits_stay_and_exact_ones_are_lifted() -> None:
    """In bf16 Qwen3-MoE rounds its logits; DeepSeek-V3 computes them in fp32, as the kernels do."""
    batch = tokens_of(2, 9)
    found = moecc.explain(tiny("qwen3_moe").requires_grad_(False).bfloat16(), batch)
    assert found.lifted == 0
    assert str(found.blocks[0].router_reason).startswith("its logits are bfloat16")

    model = tiny("deepseek_v3").requires_grad_(False)
    model.set_experts_implementation("eager")
    expected = model.double()(batch).logits
    model.to(torch.bfloat16).set_experts_implementation("grouped_mm")
    assert moecc.explain(model, batch).lifted == 1
    theirs = relative(model(batch).logits, expected)
    compiled = torch.compile(model, backend=backend_of([]), fullgraph=True)
    assert relative(compiled(batch, use_cache=False).logits, expected) <= 2 * theirs


def test_autocast_leaves_the_router() -> None:
    model = tiny("olmoe").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = moecc.explain(model, tokens_of(1, 6), use_cache=False)
    assert (found.fused, found.lifted) == (2, 0)
    assert "autocast" in str(found.blocks[0].router_reason)


def test_what_the_passes_do_not_fuse_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The IR decides: without `fuse` no layer becomes one op."""
    monkeypatch.setattr(block_ir, "PASSES", (Normalize(),))
    found = moecc.explain(tiny("olmoe").requires_grad_(False), tokens_of(1, 6))
    assert (found.fused, found.lifted) == (2, 0)
    assert "not fused: moe.gate; moe.route" in str(found.blocks[0].router_reason)


def backend_of(found: list[Finding]) -> Callable[..., Any]:
    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(rewrite(graph))
        return graph.forward

    return backend


def tensors(tokens: int = TOKENS) -> list[Tensor]:
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    return [torch.randn(tokens, HIDDEN), torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS), gate_up, down]


Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def layer_of(route: Route) -> Callable[..., Tensor]:
    """A layer by a function of logits [T, E] and a bias [E] to weights and ids."""

    def layer(x: Tensor, gate: Tensor, bias: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, ids = route(functional.linear(x, gate), bias)
        return block(x, ids, weights, gate_up, down)

    return layer


def by_hand(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    exponentials = (logits - logits.amax(1, keepdim=True)).exp()
    order = torch.argsort(exponentials, dim=1, descending=True)[:, :TOP_K]
    taken = exponentials.gather(1, order)
    return taken / taken.sum(1, keepdim=True), order


def biased(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = 1 / (1 + torch.exp(-logits))
    ids = (scores + bias).topk(TOP_K, dim=-1, sorted=False).indices
    taken = scores.gather(1, ids)
    return 1.5 * taken / taken.sum(1, keepdim=True), ids


def softmax_top_k(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(1).topk(TOP_K, dim=1)
    return weights, ids


SPELLINGS: dict[str, tuple[Route, Router]] = {
    "softmax": (softmax_top_k, Router()),
    "by_hand": (by_hand, Router(normalize=True)),
    "selected_first": (
        lambda logits, _: (logits.topk(TOP_K).values.softmax(1), logits.topk(TOP_K).indices),
        Router(normalize=True),
    ),
    "biased": (
        biased,
        Router(score="sigmoid", selection_bias=True, normalize=True, scale=1.5),
    ),
    "a_bound_on_the_sum": (
        lambda logits, _: (
            (taken := logits.sigmoid().topk(TOP_K)).values
            / taken.values.sum(1, keepdim=True).clamp(min=1e-3),
            taken.indices,
        ),
        Router(score="sigmoid", normalize=True, norm_min=1e-3),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("seed", range(3))
def test_a_router_is_what_it_computes(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    route, router = SPELLINGS[name]
    inputs, found = tensors(), list[Finding]()
    out = torch.compile(layer_of(route), backend=backend_of(found), fullgraph=True)(*inputs)
    assert found[0].router_reason is None
    assert found[0].layer is not None
    assert lowered_shape(found[0].layer.ir, TOKENS).router == router
    expected = layer_of(route)(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def logits_written(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_top_k(logits.mul_(2), bias)


def noisy(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_top_k(logits + 1e-3 * torch.randn_like(logits), bias)


def bias_in_weights(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (logits.sigmoid() + bias).topk(TOP_K, dim=1)
    return weights, ids


def second_best(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(1).topk(TOP_K + 1, dim=1)
    return weights[:, 1:], ids[:, 1:]


def within_capacity(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """An expert serves the first five that choose it."""
    weights, ids = softmax_top_k(logits, bias)
    place = functional.one_hot(ids.flatten(), EXPERTS).cumsum(0).gather(1, ids.view(-1, 1))
    return weights * (place.view_as(ids) <= 5), ids


def by_token(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = softmax_top_k(logits, bias)
    return weights * torch.linspace(1, 2, TOKENS)[:, None], ids


NEAR_MISSES: dict[str, tuple[Route, str]] = {
    "scaled_twice": (
        lambda logits, b: (softmax_top_k(logits, b)[0] * 3 * 2.5, softmax_top_k(logits, b)[1]),
        "",
    ),
    "a_temperature": (lambda logits, bias: softmax_top_k(logits / 2, bias), ""),
    "noise": (noisy, ""),
    "the_bias_in_the_weights": (bias_in_weights, ""),
    "the_bias_in_the_logits": (lambda logits, bias: softmax_top_k(logits + bias, bias), ""),
    "not_the_best": (second_best, ""),
    "a_capacity": (within_capacity, ""),
    "a_scale_for_each_token": (by_token, ""),
    "two_biases": (lambda logits, bias: softmax_top_k(logits * bias + bias.neg(), bias), ""),
    "logits_written": (logits_written, "its logits are written to by mul_"),
    "rounded_logits": (lambda logits, bias: softmax_top_k(logits.bfloat16(), bias), "that bfloat16 rounds"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_another_router_stays_and_its_experts_are_fused(name: str) -> None:
    route, reason = NEAR_MISSES[name]
    layer, inputs, found = layer_of(route), tensors(), list[Finding]()
    compiled = torch.compile(layer, backend=backend_of(found), fullgraph=True)
    torch.manual_seed(1)
    out = compiled(*(tensor.clone() for tensor in inputs))
    assert found[0].shape is not None
    assert found[0].layer is None
    assert re.search(reason or "agrees with no router", str(found[0].router_reason)), found
    if name != "noise":
        torch.testing.assert_close(out, layer(*inputs), rtol=1e-3, atol=1e-3)


def gate_of_others(x: Tensor, gate: Tensor, _: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    weights, ids = functional.linear(x * 2, gate).softmax(1).topk(TOP_K, dim=1)
    return block(x, ids, weights, gate_up, down)


def two_gates(x: Tensor, gate: Tensor, _: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    logits = functional.linear(x, gate) + functional.linear(x, gate.flip(0))
    weights, ids = logits.softmax(1).topk(TOP_K, dim=1)
    return block(x, ids, weights, gate_up, down)


def ids_read(x: Tensor, gate: Tensor, _: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = functional.linear(x, gate).softmax(1).topk(TOP_K, dim=1)
    return block(x, ids, weights, gate_up, down), ids


def gate_written(x: Tensor, gate: Tensor, _: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate = gate.clone()
    weights, ids = functional.linear(x, gate).softmax(1).topk(TOP_K, dim=1)
    gate.zero_()
    return block(x, ids, weights, gate_up, down) + gate.sum()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (gate_of_others, "0 linear layers of its hidden states"),
        (two_gates, "2 linear layers of its hidden states"),
        (ids_read, "which the op does not give, is read by"),
        (gate_written, "is written to by zero_"),
    ],
)
def test_what_stands_around_a_router_decides_too(layer: Callable[..., Any], reason: str) -> None:
    inputs, found = tensors(), list[Finding]()
    out = torch.compile(layer, backend=backend_of(found), fullgraph=True)(*inputs)
    assert found[0].shape is not None
    assert reason in str(found[0].router_reason)
    torch.testing.assert_close(out, layer(*inputs), rtol=1e-4, atol=1e-4)


def test_the_op_has_no_gradient_and_takes_no_tokens() -> None:
    found: list[Finding] = []
    x, gate, _, gate_up, down = tensors()
    torch.compile(layer_of(softmax_top_k), backend=backend_of(found))(x, gate, _, gate_up, down)
    assert found[0].layer is not None
    arguments = (gate, None, None, gate_up, down, None, None, found[0].layer.ir)
    assert torch.ops.moecc.moe_block(x[:0], *arguments).shape == (0, HIDDEN)
    torch.library.opcheck(torch.ops.moecc.moe_block.default, (x, *arguments))
    out = torch.ops.moecc.moe_block(x.requires_grad_(), *arguments)
    with pytest.raises(MoeccError, match="a whole layer has no gradient"):
        out.sum().backward()


def test_a_checkpointed_layer_keeps_its_router_and_its_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, inputs, found = layer_of(by_hand), tensors(), list[Finding]()
    x, gate = (tensor.requires_grad_() for tensor in inputs[:2])
    expected = torch.autograd.grad(layer(*inputs).square().sum(), [x, gate])
    compiled = torch.compile(
        lambda *a: checkpoint(layer, *a, use_reentrant=False), backend=backend_of(found), fullgraph=True
    )
    got = torch.autograd.grad(compiled(*inputs).square().sum(), [x, gate])
    assert str(found[0].router_reason) == "gradients are wanted"
    for actual, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-3, atol=1e-3)


def test_a_part_without_gradients_is_lifted_and_the_rest_is_not() -> None:
    """What counts is where a layer stands, not where the graph is called."""

    def both(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            without = layer_of(softmax_top_k)(*inputs)
        return without + layer_of(by_hand)(*inputs)

    inputs, found = tensors(), list[Finding]()
    inputs[0].requires_grad_()
    out = torch.compile(both, backend=backend_of(found), fullgraph=True)(*inputs)
    assert [finding.router_reason for finding in found] == [None, "gradients are wanted"]
    assert out.requires_grad
    torch.testing.assert_close(out, both(*inputs), rtol=1e-4, atol=1e-4)
