"""model.yaml: a good file becomes the spec it says; every bad file is one located line with a hint."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moecc.errors import InputError, Location
from moecc.frontend.model_yaml import load_model_yaml
from moecc.frontend.spec import PlacementSpec, ServingSpec, TokensPerDevice
from moecc.frontend.trace import save_trace
from moecc.frontend.workloads import workloads
from moecc.ir.semantics import Activation, Router
from moecc.solvers.routing import assumed_routing

GOOD = """\
moecc: 1
model:
  hidden_size: 2048
  moe_layers: 3
  dense_layers: [0]
  experts: 128
  top_k: 8
  intermediate_size: 768
  activation: silu_glu
  router: {score: softmax, normalize: true}
  shared_experts: {count: 0}
  dtype: bfloat16
cluster:
  device: h100-sxm
  nodes: 2
  devices_per_node: 8
workloads:
  - {name: chat, routing: uniform}
  - {name: code, routing: zipf, alpha: 1.5, weight: 3}
serving:
  execution: home
  tokens_per_device: {decode: 64, prefill: 2048}
placement: {objective: traffic, balance: workload, slots_per_device: 9, max_imbalance: 1.15, time_limit_s: 30}
targets: [sm_90, x86]
"""
PRESET = """\
moecc: 1
model: {preset: qwen3-30b-a3b}
cluster: {device: h100-sxm, devices_per_node: 8}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "model.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    spec = load_model_yaml(write(tmp_path, GOOD))
    model = spec.model
    assert (model.layers, model.moe_layers, model.dense_layers) == (4, (1, 2, 3), (0,))
    assert (model.hidden_size, model.experts, model.top_k, model.intermediate_size) == (2048, 128, 8, 768)
    assert model.router == Router(score="softmax", normalize=True)
    assert model.activation == Activation(kind="silu_glu")
    assert (spec.cluster.device, spec.cluster.devices) == ("h100-sxm", 16)
    assert spec.serving == ServingSpec(tokens_per_device=TokensPerDevice(decode=64, prefill=2048))
    assert spec.placement == PlacementSpec(slots_per_device=9, max_imbalance=1.15)
    assert spec.targets == ("sm_90", "x86")
    assert [(w.name, w.routing, w.alpha, w.weight) for w in spec.workloads] == [
        ("chat", "uniform", 1.0, 1.0),
        ("code", "zipf", 1.5, 3.0),
    ]
    assert (model.attention, model.vocab_size, model.notes) == (None, None, ())


def test_memory_becomes_slots(tmp_path: Path) -> None:
    # An expert is 3 x 2048 x 768 bfloat16 elements, 9.437 MB, in each of 3 layers: 0.3 GB hold 10 of them.
    text = GOOD.replace("slots_per_device: 9", "memory_per_device_gb: 0.3")
    spec = load_model_yaml(write(tmp_path, text))
    assert spec.model.expert_bytes == 9437184
    assert spec.placement.slots_per_device == 10
    assert spec.notes == ("0.3 GB for experts on a device: 10 slots of 3 layers x 9.437 MB take 0.2831 GB",)


def test_every_value_knows_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    spec = load_model_yaml(path)
    assert spec.model.locations["top_k"] == Location(str(path), 7, 10)
    assert spec.locations["cluster.device"] == Location(str(path), 14, 11)
    assert spec.locations["targets.1"] == Location(str(path), 24, 18)
    lines = GOOD.splitlines()
    at = spec.locations["model.router.score"]
    assert isinstance(at, Location)
    assert lines[at.line - 1][at.column - 1 :].startswith("softmax")


def test_a_preset_and_the_defaults_which_are_stated(tmp_path: Path) -> None:
    spec = load_model_yaml(write(tmp_path, PRESET))
    assert spec.model.name == "qwen3-30b-a3b"
    assert spec.cluster.nodes == 1
    assert spec.serving == ServingSpec()
    assert spec.placement == PlacementSpec()
    assert spec.targets == ()
    assert spec.notes == ("no workloads are given: uniform routing is assumed",)
    assert [(w.name, w.routing) for w in spec.workloads] == [("uniform", "uniform")]


def test_a_router_like_deepseek_v3_inline(tmp_path: Path) -> None:
    router = (
        "{score: sigmoid, bias: selection, groups: 8, top_groups: 4, group_score: top2_sum, "
        "normalize: true, norm_eps: 1e-20, scale: 2.5}"
    )
    text = GOOD.replace("{score: softmax, normalize: true}", router).replace("{count: 0}", "{count: 2}")
    model = load_model_yaml(write(tmp_path, text)).model
    assert model.router == Router(
        score="sigmoid",
        selection_bias=True,
        groups=8,
        top_groups=4,
        group_score="top2_sum",
        normalize=True,
        norm_eps=1e-20,
        scale=2.5,
    )
    assert not model.router_bias
    assert (model.shared_experts.count, model.shared_experts.intermediate_size) == (2, 768)


def test_a_model_like_gpt_oss_inline(tmp_path: Path) -> None:
    text = GOOD.replace("{score: softmax, normalize: true}", "{select_first: true, bias: logits}").replace(
        "silu_glu", "{kind: clamped_swiglu, limit: 6}\n  expert_bias: true"
    )
    text = text.replace("dtype:", "attention: {heads: 16, kv_heads: 2, sliding_window: 64}\n  dtype:")
    model = load_model_yaml(write(tmp_path, text)).model
    assert model.router == Router(select_first=True)
    assert model.router_bias
    assert model.expert_bias
    assert model.activation == Activation(kind="clamped_swiglu", limit=6.0)
    assert model.attention is not None
    assert (model.attention.head_dim, model.attention.kv_elements) == (128, 512)
    assert model.attention.window_layers == (0, 1, 2, 3)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    config = tmp_path / "deep" / "config.json"
    config.write_text(
        '{"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 3, "num_local_experts": 4, '
        '"num_experts_per_tok": 2, "intermediate_size": 8, "vocab_size": 9, "num_attention_heads": 2}'
    )
    routing = assumed_routing("zipf", layers=3, experts=4, top_k=2, tokens=20)
    save_trace(tmp_path / "deep" / "t.npz", routing)
    text = PRESET.replace("preset: qwen3-30b-a3b", "hf_config: ./config.json, name: tiny")
    path = write(tmp_path / "deep", text + "workloads: [{name: chat, trace: t.npz, weight: 2}]\n")
    monkeypatch.chdir(tmp_path)
    spec = load_model_yaml(Path("deep/model.yaml"))
    assert spec.model.name == "tiny"
    assert spec.model.locations["top_k"] == Location(
        "deep/config.json", 1, 1 + config.read_text().index("2, ")
    )
    (chat,) = workloads(spec)
    np.testing.assert_array_equal(chat.topk_ids, routing.topk_ids)
    assert (chat.name, chat.weight) == ("chat", 2.0)
    assert "not measured" in chat.assumption  # an assumed routing that was saved is still assumed
    folder = path.read_text().replace("./config.json", ".")
    path.write_text(folder)
    assert load_model_yaml(path).model.experts == 4


def test_assumed_workloads_say_so_and_follow_the_seed(tmp_path: Path) -> None:
    spec = load_model_yaml(write(tmp_path, GOOD))
    first, second = workloads(spec)
    assert (first.name, second.name, second.weight) == ("chat", "code", 3.0)
    assert first.assumption == "assumed routing (uniform), not measured"
    assert second.assumption == "assumed routing (zipf, alpha 1.5), not measured"
    assert (first.layers, first.num_experts, first.top_k) == (3, 128, 8)
    assert second.loads().max() > 3 * first.loads().max()
    np.testing.assert_array_equal(workloads(spec)[1].topk_ids, second.topk_ids)
    other = load_model_yaml(write(tmp_path, GOOD.replace("time_limit_s: 30", "seed: 1")))
    assert not np.array_equal(workloads(other)[0].topk_ids, first.topk_ids)


def test_a_trace_of_another_model_is_refused_at_its_line(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", assumed_routing("uniform", layers=2, experts=128, top_k=8, tokens=4))
    text = GOOD.replace("chat, routing: uniform", "chat, trace: t.npz")
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        workloads(load_model_yaml(path))
    assert str(caught.value) == (
        f"{path}:18:25: the trace 'chat' has 2 layers, the model has 3 MoE layers; "
        "hint: give a trace that was recorded from this model"
    )


def test_reading_stays_light() -> None:
    code = (
        "import sys, moecc.frontend.workloads, moecc.frontend.model_yaml\n"
        "print(sorted({'torch', 'ortools', 'triton', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    rng, refused = random.Random(0), 0
    for _ in range(300):
        content = bytearray(GOOD.encode())
        for _ in range(rng.choice((1, 1, 2, 6))):
            content[rng.randrange(len(content))] = rng.choice((rng.randrange(256), *b"\t:{}[]'\"&*-#\n 0"))
        path = write(tmp_path, bytes(content))
        try:
            load_model_yaml(path)
        except InputError as error:
            refused += 1
            line = str(error)
            if "\n" in line or not error.hint or not line.startswith(f"{path}:"):
                raise
    assert refused > 150


def test_experts_without_a_gate(tmp_path: Path) -> None:
    text = GOOD.replace("activation: silu_glu", "activation: {kind: relu2, gated: false}")
    assert load_model_yaml(write(tmp_path, text)).model.activation == Activation(kind="relu2")
