"""Tiny models of every family through `experts_implementation="moecc"`: numbers of eager, whole graphs, training."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from tiny_models import EXPERTS, FAMILIES, HIDDEN, VOCABULARY, relative, tiny, tokens_of
from torch._dynamo.utils import counters

from moecc.integrations import transformers as moecc_transformers

LENGTHS = (9, 12, 17)


@dataclass(frozen=True)
class Case:
    """A model, batches of tokens, and what eager makes of the first: logits and, by name, gradients."""

    model: Any
    batches: list[Tensor]
    direction: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    model = tiny(request.param)
    model.set_experts_implementation("eager")
    batches = [tokens_of(2, length) for length in LENGTHS]
    direction = torch.randn(2, LENGTHS[0], VOCABULARY)
    return Case(model, batches, direction, *logits_and_gradients(model, model, batches[0], direction))


@pytest.fixture(autouse=True)
def nothing_is_said() -> Iterator[None]:
    """A fallback warns, and a test that does not expect one fails."""
    moecc_transformers._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moecc:")
        yield


def logits_and_gradients(
    function: Any, model: Any, batch: Tensor, direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the embeddings, the router and the experts, and whatever else the model has."""
    model.zero_grad()
    logits = function(batch, use_cache=False).logits
    (logits * direction).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_as_eager(found: tuple[Tensor, dict[str, Tensor]], case: Case) -> None:
    assert relative(found[0], case.logits) < 1e-5
    assert found[1].keys() == case.gradients.keys()
    assert any("experts" in name for name in found[1])
    for name, expected in case.gradients.items():
        assert relative(found[1][name], expected) < 1e-5, name


@pytest.mark.parametrize("implementation", ["moecc", "moecc_recompute"])
def test_logits_and_gradients_are_those_of_eager(case: Case, implementation: str) -> None:
    case.model.set_experts_implementation(implementation)
    found = logits_and_gradients(case.model, case.model, case.batches[0], case.direction)
    assert_as_eager(found, case)


def test_generate_gives_the_tokens_of_eager(case: Case) -> None:
    found = {}
    for name in ("eager", "moecc"):
        case.model.set_experts_implementation(name)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        prompt = case.batches[0]
        found[name] = case.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert found["moecc"].shape == (2, LENGTHS[0] + 4)
    torch.testing.assert_close(found["moecc"], found["eager"])


def assert_compiled_whole(case: Case, *, dynamic: bool, backend: str = "aot_eager") -> None:
    """One graph for one length, or for all of them, with the numbers of eager."""
    torch._dynamo.reset()
    counters.clear()
    case.model.set_experts_implementation("moecc")
    compiled = torch.compile(case.model, backend=backend, fullgraph=True)
    first, *others = (batch.clone() for batch in case.batches)  # a mark stays on its tensor
    if dynamic:
        torch._dynamo.mark_dynamic(first, 1)
    assert_as_eager(logits_and_gradients(compiled, case.model, first, case.direction), case)
    for batch in others if dynamic else []:
        found = compiled(batch, use_cache=False).logits
        case.model.set_experts_implementation("eager")
        with torch.no_grad():
            expected = case.model(batch, use_cache=False).logits
        case.model.set_experts_implementation("moecc")
        assert relative(found, expected) < 1e-5
    # Jamba's own scan is unrolled over the length.
    graphs = len(LENGTHS) if dynamic and case.model.config.model_type == "jamba" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_one_whole_graph(case: Case) -> None:
    assert_compiled_whole(case, dynamic=False)


@pytest.mark.slow
def test_one_whole_graph_serves_all_lengths(case: Case) -> None:
    assert_compiled_whole(case, dynamic=True)


@pytest.mark.slow
def test_export_keeps_the_experts_as_one_op(case: Case) -> None:
    case.model.set_experts_implementation("moecc")
    with torch.no_grad():
        exported = torch.export.export(
            case.model, (), {"input_ids": case.batches[0], "use_cache": False}, strict=False
        )
        found = exported.module()(input_ids=case.batches[0], use_cache=False).logits
    assert relative(found, case.logits) < 1e-5
    layers = sum(hasattr(module, "_is_expert_parallel") for module in case.model.modules())
    ops = [node for node in exported.graph.nodes if node.target is torch.ops.moecc.experts.default]
    assert len(ops) == layers


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_inductor_compiles_the_graph_whole(case: Case) -> None:
    assert_compiled_whole(case, dynamic=True, backend="inductor")


def test_layers_compiled_apart_share_one_graph() -> None:
    counters.clear()
    torch._dynamo.reset()
    model = tiny("gpt_oss")
    model.set_experts_implementation("moecc")
    x, ids, weights = torch.randn(5, HIDDEN), torch.randint(0, EXPERTS, (5, 1)), torch.rand(5, 1)
    layers = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    for layer in layers:
        expected = layer(x, ids, weights)
        layer.compile(backend="aot_eager", fullgraph=True)
        assert relative(layer(x, ids, weights), expected) < 1e-6
    assert len(layers) == 2
    assert counters["stats"]["unique_graphs"] == 1


PROCESS = """
import sys
import torch
from torch._dynamo.utils import counters
sys.path.append(sys.argv[1])
from tiny_models import EXPERTS, FAMILIES, HIDDEN, VOCABULARY, relative, tiny, tokens_of
import moecc.integrations.transformers
model = tiny("qwen3_moe")
model.set_experts_implementation("moecc")
torch.manual_seed(0)
logits = torch.compile(model, fullgraph=True)(tokens_of(2, 9), use_cache=False).logits
logits.sum().backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], logits.sum().item())
"""


@pytest.mark.slow
def test_a_second_process_finds_what_inductor_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first[0] == "0"
    assert int(first[1]) >= 2  # forward and backward
    assert second[1:] == ["0", first[2]]
    assert int(second[0]) >= 2
