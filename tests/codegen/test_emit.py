"""Emitted modules: their text, that it stands alone, and that it computes what the launcher computes."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecc.autotune.defaults import default_configs
from moecc.codegen.config import LayerShape
from moecc.codegen.emit import emit_module
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.errors import InputError
from moecc.ir.semantics import Activation, Router

GOLDEN = Path(__file__).parent / "golden"
SHAPES = {
    "gpt_oss_20b_decode": LayerShape(
        tokens=16,
        hidden=2880,
        intermediate=2880,
        experts=32,
        top_k=4,
        router=Router(select_first=True),
        activation=Activation(kind="clamped_swiglu"),
        has_router_bias=True,
        has_expert_bias=True,
    ),
    "deepseek_v3_prefill": LayerShape(
        tokens=4096,
        hidden=7168,
        intermediate=2048,
        experts=256,
        top_k=8,
        shared=1,
        router=Router(
            score="sigmoid",
            selection_bias=True,
            groups=8,
            top_groups=4,
            group_score="top2_sum",
            normalize=True,
            norm_eps=1e-20,
            scale=2.5,
        ),
    ),
}
SMALL = LayerShape(tokens=7, hidden=32, intermediate=16, experts=8, top_k=2, shared=1, dtype="float32")


def emit(shape: LayerShape, name: str, *targets: str) -> str:
    return emit_module(shape, {target: default_configs(shape, target) for target in targets}, name)


@pytest.mark.parametrize("name", SHAPES)
def test_golden(name, update_golden):
    text = emit(SHAPES[name], name, "sm_90", "gfx942", "x86", "interpret")
    path = GOLDEN / f"{name}.py"
    if update_golden:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name} is stale: pytest --update-golden, then review"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_emitted_text_is_clean_and_stands_alone(name, tmp_path):
    text = emit(SHAPES[name], name, "sm_80", "sm_90", "sm_100", "gfx942", "x86", "interpret")
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"torch", "triton"} | set(sys.stdlib_module_names)
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", config, path], capture_output=True, text=True
        )
        if "No module named ruff" in done.stderr:
            pytest.skip("ruff is not installed")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def small(tmp_path):
    """The small layer as a module from a file, as the runtime loads it, and the launcher that it was made from."""
    target = "x86" if not torch.cuda.is_available() else "sm_{}{}".format(*torch.cuda.get_device_capability())
    path = tmp_path / "small.py"
    path.write_text(emit(SMALL, "small", target))
    spec = importlib.util.spec_from_file_location("small", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["small"] = module
    spec.loader.exec_module(module)
    yield module, Launcher(freeze_layer(SMALL), {target: freeze_configs(default_configs(SMALL, target))})
    del sys.modules["small"]


def test_emitted_module_computes_what_the_launcher_does(small):
    module, launcher = small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(7, 32, device=device)
    weights = {
        "gate": torch.randn(8, 32, device=device),
        "gate_up": torch.randn(9, 32, 32, device=device),
        "down": torch.randn(9, 32, 16, device=device),
    }
    out = module.forward(x, weights, residual=x)
    assert torch.isfinite(out).all()
    assert torch.equal(out, launcher.forward(x, weights, residual=x))
    ids, topk_weights = module.route(x, weights)
    assert ids[:, 2].tolist() == [8] * 7
    assert torch.equal(module.experts(x, ids, topk_weights, weights, residual=x), out)


@pytest.mark.parametrize("tokens", [3, 40, 1030])
def test_workspace_bytes_is_what_forward_allocates(tokens, small, monkeypatch):
    module, _ = small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = next(iter(module.CONFIGS))
    x = torch.zeros(tokens, 32, device=device)
    weights = {"gate": torch.zeros(8, 32), "gate_up": torch.zeros(9, 32, 32), "down": torch.zeros(9, 32, 16)}
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    module.launcher._idle_counters.clear()
    allocated = []

    def counting(allocate):
        def count(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            # Triton allocates for itself.
            if sys._getframe(1).f_globals["__name__"] == "small":
                allocated.append(tensor.numel() * tensor.itemsize)
            return tensor

        return count

    for name in ("empty", "zeros", "empty_like"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", counting(torch.Tensor.new_empty))
    out = module.forward(x, weights)
    assert module.workspace_bytes(tokens, target) == sum(allocated) - out.numel() * out.itemsize


def test_names_and_launches_are_in_the_docstring():
    text = emit(replace(SMALL, tokens=2000), "layer_3", "sm_90")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring.startswith("layer_3: one Mixture-of-Experts layer")
    assert (
        "8 experts and 1 shared, top-2, hidden 32, intermediate 16, float32; tuned for 2000 tokens"
        in docstring
    )
    assert "sm_90: router scatter gate_up down combine" in docstring


def test_what_cannot_be_emitted():
    with pytest.raises(InputError, match="layer: no configs to emit"):
        emit_module(SMALL, {}, "layer")
    with pytest.raises(InputError, match="layer: unknown target 'sm_1'"):
        emit_module(SMALL, {"sm_1": default_configs(SMALL, "sm_90")}, "layer")
