"""`torch.compile(model, backend="moecc")` on untouched tiny models of many families, against the same model in eager
mode. Most tests hand the rewritten graph to AOTAutograd alone: what inductor adds takes seconds to compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from tiny_models import BY_COST, relative, tiny, tokens_of
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import moecc
from moecc.integrations.dynamo.backend import compile_graph


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A block that is left warns, and a test that does not expect one fails."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moecc:")
        yield
    torch.compiler.reset()


class Compiled:
    """A model compiled by the backend without inductor; `graphs` are counted, `op` is moecc's in the last of them."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.graphs, self.op = 0, ""
        backend = partial(compile_graph, inner=self._count)
        self.call = torch.compile(model, backend=backend, fullgraph=True, **options)

    def _count(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        (self.op,) = {call for call in calls if call.startswith("moecc.")}
        assert not any("grouped_mm" in call for call in calls)
        return aot_eager(graph, inputs)


def assert_same_gradients(model: Any, compiled: Any, batch: torch.Tensor, bound: float) -> None:
    """The loss is of logits drawn anew, so that every gradient is large enough to be compared."""
    target, found = torch.randn(*batch.shape, 256), {}
    for name, call in (("eager", model), ("compiled", compiled)):
        model.zero_grad()
        (call(batch, use_cache=False).logits * target).sum().backward()
        found[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found["eager"].keys() == found["compiled"].keys()
    for name, expected in found["eager"].items():
        if expected.norm() > 0:
            assert relative(found["compiled"][name], expected) < bound, name


@pytest.mark.parametrize("family", BY_COST)
def test_logits_and_gradients_are_those_of_eager(family: str) -> None:
    model = tiny(family)
    compiled = Compiled(model)
    batch = tokens_of(2, 7)
    with torch.no_grad():
        assert relative(compiled.call(batch, use_cache=False).logits, model(batch).logits) < 1e-5
    assert compiled.op == "moecc.moe_block.default"
    assert_same_gradients(model, compiled.call, batch, 1e-4)
    assert compiled.op == "moecc.experts.default"


@pytest.mark.parametrize("family", BY_COST)
def test_every_block_is_fused(family: str) -> None:
    model = tiny(family)
    found = moecc.explain(model, tokens_of(1, 6))
    layers = sum(hasattr(module, "_is_expert_parallel") for module in model.modules())
    assert (found.fused, len(found.blocks), found.graphs, found.breaks) == (layers, layers, 1, ())
    assert {block.shape.tokens for block in found.blocks if block.shape} == {"6"}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_one_graph_serves_many_lengths(family: str, form: str) -> None:
    model = tiny(family).requires_grad_(False)
    model.set_experts_implementation(form)
    compiled = Compiled(model, dynamic=True)
    compiled.call(tokens_of(2, 5), use_cache=False)
    graphs = compiled.graphs
    for length in (9, 17, 6):
        batch = tokens_of(2, length)
        expected = model(batch, use_cache=False).logits
        assert relative(compiled.call(batch, use_cache=False).logits, expected) < 1e-5
    assert (compiled.graphs, compiled.op) == (graphs, "moecc.moe_block.default")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_gathered_matrices_are_fused_too(family: str) -> None:
    model = tiny(family)
    model.set_experts_implementation("batched_mm")
    compiled, batch = Compiled(model), tokens_of(2, 7)
    with torch.no_grad():
        assert relative(compiled.call(batch, use_cache=False).logits, model(batch).logits) < 1e-5
    assert_same_gradients(model, compiled.call, batch, 1e-4)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_experts_of_other_devices(family: str, form: str) -> None:
    """The masks of expert parallelism are understood, with ids that are none of this device's."""
    model = tiny(family).requires_grad_(False)
    model.set_experts_implementation(form)
    module = [m for m in model.modules() if hasattr(m, "_is_expert_parallel")][-1]
    module._is_expert_parallel = True
    x = torch.randn(9, 32)
    weights, ids = torch.rand(9, 9).topk(3, dim=1)
    weights = weights.masked_fill(ids == 8, 0.0)
    expected = module(x, ids, weights)
    assert relative(Compiled(module).call(x, ids, weights), expected) < 1e-5


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_half_precision_errs_no_more_than_the_untouched_model(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    batch = tokens_of(2, 9)
    model.set_experts_implementation("eager")
    expected = model.double()(batch).logits
    model.to(torch.bfloat16).set_experts_implementation("grouped_mm")
    theirs = relative(model(batch).logits, expected)
    assert relative(Compiled(model).call(batch, use_cache=False).logits, expected) <= 2 * theirs


def test_autocast_leaves_the_experts_in_the_type_of_their_weights() -> None:
    """As grouped_mm does: cast to bf16, they would err by some thousandths."""
    module = [m for m in tiny("olmoe").modules() if hasattr(m, "_is_expert_parallel")][-1]
    weights, ids = torch.rand(9, 8).topk(3, dim=1)
    x, target, found = torch.randn(9, 32, requires_grad=True), torch.randn(9, 32), []
    for call in (module, Compiled(module).call):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x, ids, weights)
            assert out.dtype == torch.float32
        (x_grad,) = torch.autograd.grad((out * target).sum(), x, retain_graph=True)
        (out * target).sum().backward()
        found.append((out, x_grad, module.gate_up_proj.grad.clone(), module.down_proj.grad.clone()))
    for compiled, eager in zip(found[1], found[0], strict=True):
        assert relative(compiled.detach(), eager.detach()) < 1e-5


def test_inductor_takes_the_rest() -> None:
    model, batch = tiny("qwen3_moe").requires_grad_(False), tokens_of(1, 6)
    counters.clear()
    compiled = torch.compile(model, backend=compile_graph, fullgraph=True)
    assert relative(compiled(batch, use_cache=False).logits, model(batch).logits) < 1e-5
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 1


def test_options_and_modes_are_inductors() -> None:
    taken: list[Any] = []
    model, batch = tiny("qwen3_moe").requires_grad_(False), tokens_of(1, 6)

    def inner(graph: Any, inputs: Any) -> Callable[..., Any]:
        taken.append(graph)
        return graph.forward

    backend = partial(compile_graph, inner=inner)
    for settings in ({"mode": "reduce-overhead"}, {"options": {"max_autotune": True}}):
        torch.compile(model, backend=backend, **settings)(batch)
        torch.compiler.reset()
    assert len(taken) == 2


def test_the_backend_is_listed_without_an_import() -> None:
    from importlib.metadata import entry_points

    if not (found := entry_points(group="torch_dynamo_backends", name="moecc")):
        pytest.skip("installed before the entry point was there")
    assert next(iter(found)).load() is compile_graph
    assert "moecc" in torch._dynamo.list_backends(exclude_tags=())
