"""Every family against transformers' own modules: router numbers, activation, which layers are MoE, parameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from family_cases import CASES, correction_bias, feed_forward, fill

from moecc.errors import InputError
from moecc.frontend.hf_config import load_hf_config, load_preset, preset_names
from moecc.frontend.spec import ModelSpec
from moecc.runtime import reference


@pytest.mark.parametrize("case", CASES)
def test_router_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    spec, gate = CASES[case].spec(tmp_path), CASES[case].router_of()
    generator = torch.Generator().manual_seed(len(case))
    fill(gate, generator)
    hidden = torch.randn(64, spec.hidden_size, generator=generator)
    correction = correction_bias(gate)
    with torch.no_grad():
        if case == "minimax-m2":  # the block holds the bias
            correction = torch.randn(spec.experts, generator=generator)
            logits, weights, ids = gate(hidden, correction)
        else:
            logits, weights, ids = gate(hidden)
    assert spec.router_bias == (getattr(gate, "bias", None) is not None)
    assert spec.router.selection_bias == (correction is not None)
    assert spec.top_k == ids.shape[1]
    selection = reference.select(spec.router, logits.double(), correction)
    torch.testing.assert_close(
        np.sort(ids.numpy()), np.sort(selection.selecting.topk(spec.top_k).indices.numpy())
    )
    want = reference.routing_weights(spec.router, selection, ids)
    torch.testing.assert_close(weights.double(), want, rtol=2e-5, atol=1e-7)


BLOCKS = [case for case in CASES if case != "gpt-oss"]  # interleaved and transposed: see the next test


@pytest.mark.parametrize("case", BLOCKS)
def test_the_block_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    """Router, experts, shared experts and the gate before them, from nothing but the spec and the weights."""
    spec, model = CASES[case].spec(tmp_path), CASES[case].model()
    block = feed_forward(model.model.layers[spec.moe_layers[-1]])
    generator = torch.Generator().manual_seed(len(case))
    fill(block, generator)
    x = torch.randn(1, 48, spec.hidden_size, generator=generator)
    with torch.no_grad():
        got = block(x)[0]
        want = _block(spec, block, x[0])
    assert got.norm() > 1
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def _block(spec: ModelSpec, block: Any, x: torch.Tensor) -> torch.Tensor:
    """What the spec says that the block computes: [tokens, hidden] in float64."""
    router = block.gate if hasattr(block, "gate") else block.router
    logits = reference.logits(x, {"gate": router.weight})
    selection = reference.select(spec.router, logits, correction_bias(block))
    ids = selection.selecting.topk(spec.top_k).indices
    weights = reference.routing_weights(spec.router, selection, ids)
    first = block.experts.gate_up_proj if spec.activation.gated else block.experts.up_proj
    experts = {"gate_up": first, "down": block.experts.down_proj}
    out = reference.experts(x, ids, weights, experts, spec.activation)
    if spec.shared_experts.count:
        out += _shared(spec, block, x)
    return out


def _shared(spec: ModelSpec, block: Any, x: torch.Tensor) -> torch.Tensor:
    """transformers writes n shared experts as one of n times the width."""
    mlp = block.shared_expert if hasattr(block, "shared_expert") else block.shared_experts
    shared = spec.shared_experts
    assert mlp.up_proj.weight.shape[0] == shared.count * shared.intermediate_size
    first = [mlp.gate_proj.weight, mlp.up_proj.weight] if spec.activation.gated else [mlp.up_proj.weight]
    weight = torch.ones(len(x), 1)
    if shared.gated:
        weight = reference.logits(x, {"gate": block.shared_expert_gate.weight}).sigmoid()
    ids = torch.zeros(len(x), 1, dtype=torch.int32)
    stacked = {"gate_up": torch.cat(first)[None], "down": mlp.down_proj.weight[None]}
    return reference.experts(x, ids, weight, stacked, spec.activation)


def test_clamped_swiglu_is_what_gpt_oss_computes(tmp_path: Path) -> None:
    spec = CASES["gpt-oss"].spec(tmp_path)
    experts = CASES["gpt-oss"].module.GptOssExperts(CASES["gpt-oss"].config)
    gate_up = 9 * torch.randn(50, 2 * spec.intermediate_size, generator=torch.Generator().manual_seed(0))
    g, u = gate_up[:, ::2].double().numpy(), gate_up[:, 1::2].double().numpy()
    act = spec.activation
    g, u = np.minimum(g, act.limit), np.clip(u, -act.limit, act.limit)
    want = (u + 1) * g / (1 + np.exp(-act.alpha * g))
    assert act.kind == "clamped_swiglu"
    np.testing.assert_allclose(experts._apply_gate(gate_up).numpy(), want, rtol=1e-4, atol=1e-5)


def matrix_parameters(spec: ModelSpec) -> int:
    """Elements of all tensors with two or more dimensions (no norms, no linear biases)."""
    assert spec.vocab_size is not None
    assert spec.attention is not None
    a, hidden, experts = spec.attention, spec.hidden_size, spec.experts
    if a.kind == "mla":
        q = hidden * a.q_lora_rank + a.q_lora_rank * a.heads * a.head_dim if a.q_lora_rank else 0
        q = q or hidden * a.heads * a.head_dim
        kv = hidden * a.kv_elements + a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        attention = q + kv + a.heads * a.v_head_dim * hidden
    else:
        attention = 2 * hidden * a.heads * a.head_dim + hidden * a.kv_elements
    matrices = 3 if spec.activation.gated else 2
    shared = spec.shared_experts.count * spec.shared_experts.intermediate_size
    moe = matrices * hidden * (experts * spec.intermediate_size + shared) + experts * hidden
    moe += hidden if spec.shared_experts.gated else 0
    if spec.expert_bias:
        moe += experts * (2 * spec.intermediate_size + hidden)
    dense = matrices * hidden * (spec.dense_intermediate_size or 0)
    embeddings = spec.vocab_size * hidden * (1 if spec.tie_embeddings else 2)
    mamba = len(spec.mamba.layers) * spec.mamba.parameters if spec.mamba else 0
    attentions = spec.layers if a.layers is None else len(a.layers)
    feed_forwards = len(spec.moe_layers) * moe + len(spec.dense_layers) * dense
    return embeddings + attentions * attention + mamba + feed_forwards


@pytest.mark.parametrize("case", CASES)
def test_layers_and_parameters_are_those_of_the_real_model(case: str, tmp_path: Path) -> None:
    spec = CASES[case].spec(tmp_path)
    with torch.device("meta"):
        model = CASES[case].model()
    blocks = dict(enumerate(map(feed_forward, model.model.layers)))
    assert len(blocks) == spec.layers
    assert spec.moe_layers == tuple(i for i, block in blocks.items() if hasattr(block, "experts"))
    assert spec.dense_layers == tuple(i for i, block in blocks.items() if hasattr(block, "down_proj"))
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "correction_bias" not in name]
    assert matrix_parameters(spec) == sum(p.numel() for p in matrices)


# Totals as published on the model cards and in the technical reports, in billions.
PUBLISHED = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "olmoe-1b-7b": 6.92,
    "deepseek-v3": 671,
    "deepseek-r1": 671,
    "kimi-k2": 1040,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "deepseek-v2": 236,
    "deepseek-v2-lite": 15.7,
    "glm-4.5": 355,
    "glm-4.5-air": 106,
    "phi-3.5-moe": 41.9,
    "minimax-m2": 230,
    "jamba-v0.1": 51.6,
}


def test_every_preset_has_a_published_size() -> None:
    assert set(preset_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    spec = load_preset(name)
    assert spec.name == name
    assert matrix_parameters(spec) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.03)


def test_a_window_holds_for_the_layers_that_have_one(tmp_path: Path) -> None:
    alternating = load_preset("gpt-oss-20b").attention
    assert alternating is not None
    assert (alternating.sliding_window, alternating.window_layers) == (128, tuple(range(0, 24, 2)))
    everywhere = CASES["mixtral"].spec(tmp_path).attention
    assert everywhere is not None
    assert (everywhere.sliding_window, everywhere.window_layers) == (7, (0, 1, 2, 3))


def test_a_shared_expert_of_several_widths_is_several_experts(tmp_path: Path) -> None:
    """Those can share the kernels of the routed ones; one behind a gate cannot."""
    wide = CASES["nemotron-h-groups"].spec(tmp_path / "wide").shared_experts
    assert (wide.count, wide.intermediate_size) == (3, 24)
    odd = CASES["nemotron-h"].spec(tmp_path / "odd").shared_experts
    assert (odd.count, odd.intermediate_size) == (1, 56)
    gated = load_preset("qwen1.5-moe-a2.7b").shared_experts
    assert (gated.count, gated.intermediate_size, gated.gated) == (1, 5632, True)


def test_mla_caches_one_latent_and_one_rotary_key() -> None:
    attention = load_preset("deepseek-v3").attention
    assert attention is not None
    assert attention.kv_elements == 576


def test_what_the_config_does_not_settle_is_noted(tmp_path: Path) -> None:
    assert any("fp8" in note for note in load_preset("deepseek-v3").notes)
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    config = {**CASES["qwen3"].values, "model_type": "qwen3_moe"}
    del config["dtype"]
    path.write_text(json.dumps(config))
    spec = load_hf_config(path)
    assert spec.name == "tiny"
    assert spec.notes == ("the config names no dtype: bfloat16 is assumed",)


def test_old_and_new_spellings_are_one_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {**CASES["qwen3"].values, "model_type": "qwen3_moe", "num_local_experts": 16}
    path.write_text(json.dumps(config))
    assert load_hf_config(path).experts == 16
    path.write_text(json.dumps({**config, "num_local_experts": 8}))
    with pytest.raises(InputError, match="num_experts and num_local_experts disagree"):
        load_hf_config(path)
