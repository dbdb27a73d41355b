"""The examples of README.md and docs/pytorch.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from tiny_models import relative, tiny, tokens_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/pytorch.md"])
def test_the_example_runs_and_its_gradients_are_those_of_eager(page: str, tmp_path: Path) -> None:
    """By inductor, in bf16, on a checkpoint that was written before."""
    text = (ROOT / page).read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(source.splitlines()) <= 10
    tiny("qwen3_moe").save_pretrained(tmp_path)
    torch._dynamo.utils.counters.clear()
    names = {"folder": tmp_path, "tokens": tokens_of(2, 11)}
    exec(source, names)
    found = {name: p.grad.clone() for name, p in names["model"].named_parameters()}
    assert not torch._dynamo.utils.counters["graph_break"]

    model, tokens = names["model"].float(), names["tokens"]
    model.set_experts_implementation("eager")
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            assert relative(found[name], parameter.grad) < 0.1, name
