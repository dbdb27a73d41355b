"""The tiny MoE example trains as well with the compiled backend: the same losses, step by step."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("this runs on the CPU, where Triton would be the GPU's", allow_module_level=True)

from torch._dynamo.backends.debugging import aot_eager

from moecc.integrations.dynamo.backend import compile_graph

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny-moe" / "train.py"
STEPS = 6


@pytest.fixture
def example() -> Any:
    """train.py, as a module."""
    spec = importlib.util.spec_from_file_location("tiny_moe_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_curve(example: Any, backend: Any) -> list[float]:
    """Losses of the first steps of a model of two layers, by the example's own loss, optimizer and autocast."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = example.model_config()
    config.num_hidden_layers = 2
    model = example.OlmoeForCausalLM(config).train()
    if backend is not None:
        model.compile(backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3)
    data, curve = torch.randint(0, 64, (4096,)), []
    for _, batch in zip(range(STEPS), example.batches(data, seed=0), strict=False):
        text, balance = example.losses(model, batch[:2, :64])
        (text + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(text.item())
    return curve


@pytest.mark.slow
def test_loss_curves_with_and_without_agree(example: Any) -> None:
    expected = loss_curve(example, None)
    found = loss_curve(example, partial(compile_graph, inner=aot_eager))
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=5e-3)
