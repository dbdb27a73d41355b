"""Every family against transformers' own modules: router numbers, activation, which layers are MoE, parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.frontend.hf_config import load_hf_config, load_preset, preset_names
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "dtype": "bfloat16",
}
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_mtp_layers": 0,
}
QWEN = {**COMMON, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 16, "head_dim": 16}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        "MixtralTopKRouter",
        {**COMMON, "intermediate_size": 24, "num_local_experts": 16, "sliding_window": 7},
    ),
    "qwen3": ("Qwen3Moe", "Qwen3MoeTopKRouter", {**QWEN, "norm_topk_prob": True}),
    "qwen3-raw": (
        "Qwen3Moe",
        "Qwen3MoeTopKRouter",
        {**QWEN, "mlp_only_layers": [2], "norm_topk_prob": False},
    ),
    "qwen3-sparse": ("Qwen3Moe", "Qwen3MoeTopKRouter", {**QWEN, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", "OlmoeTopKRouter", {**COMMON, "intermediate_size": 24, "num_experts": 16}),
    "olmoe-norm": (
        "Olmoe",
        "OlmoeTopKRouter",
        {
            **COMMON,
            "intermediate_size": 24,
            "num_experts": 16,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek": ("DeepseekV3", "DeepseekV3TopkRouter", {**DEEPSEEK, "n_group": 4, "topk_group": 2}),
    "deepseek-raw": (
        "DeepseekV3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "n_group": 8, "topk_group": 3, "norm_topk_prob": False, "q_lora_rank": None},
    ),
    "kimi": (
        "DeepseekV3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    ),
    "gpt-oss": (
        "GptOss",
        "GptOssTopKRouter",
        {**COMMON, "intermediate_size": 24, "num_local_experts": 16, "head_dim": 16},
    ),
}


def module_of(case: str) -> Any:
    kind = CASES[case][0]
    folder = {"Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe", "Olmoe": "olmoe", "DeepseekV3": "deepseek_v3"}
    name = folder.get(kind, "gpt_oss")
    return __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])


def config_of(case: str) -> Any:
    kind, _, values = CASES[case]
    return getattr(transformers, f"{kind}Config")(**values)


def spec_of(case: str, folder: Path) -> ModelSpec:
    """Through the file that transformers itself writes."""
    config_of(case).save_pretrained(folder)
    return load_hf_config(folder)


def reference_router(
    router: Router, top_k: int, logits: np.ndarray, correction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Router`'s docstring in float64, token by token: ids and weights [tokens, top_k]."""

    def score(x: np.ndarray) -> np.ndarray:
        if router.score == "sigmoid":
            return 1 / (1 + np.exp(-x))
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    ids, weights = [], []
    for row in logits.astype(np.float64):
        if router.select_first:
            chosen = np.argsort(-row, kind="stable")[:top_k]
            weight = score(row[chosen])
        else:
            scores = score(row)
            selection = scores + correction if router.selection_bias else scores.copy()
            grouped = selection.reshape(router.groups, -1)
            best = -np.sort(-grouped, axis=1)
            rank = best[:, 0] if router.group_score == "max" else best[:, :2].sum(axis=1)
            out = np.argsort(-rank, kind="stable")[router.top_groups :]
            grouped[out] = -np.inf
            chosen = np.argsort(-selection, kind="stable")[:top_k]
            weight = scores[chosen]
            if router.normalize:
                weight = weight / max(weight.sum() + router.norm_eps, router.norm_min)
        ids.append(chosen)
        weights.append(weight * router.scale)
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("case", CASES)
def test_router_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    spec, config = spec_of(case, tmp_path), config_of(case)
    generator = torch.Generator().manual_seed(len(case))
    gate = getattr(module_of(case), CASES[case][1])(config).float()
    for tensor in (*gate.parameters(), *gate.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator)
    hidden = torch.randn(64, config.hidden_size, generator=generator)
    with torch.no_grad():
        _, weights, ids = gate(hidden)
    logits = hidden.double() @ gate.weight.double().T
    if spec.router_bias:
        logits = logits + gate.bias.double()
    assert spec.router_bias == hasattr(gate, "bias")
    assert spec.router.selection_bias == hasattr(gate, "e_score_correction_bias")
    correction = getattr(gate, "e_score_correction_bias", torch.zeros(spec.experts)).double().numpy()
    want_ids, want = reference_router(spec.router, spec.top_k, logits.detach().numpy(), correction)
    dense, want_dense = np.zeros((64, spec.experts)), np.zeros((64, spec.experts))
    np.put_along_axis(dense, ids.numpy(), weights.double().numpy(), axis=1)
    np.put_along_axis(want_dense, want_ids, want, axis=1)
    assert spec.top_k == ids.shape[1]
    np.testing.assert_array_equal(np.sort(ids.numpy()), np.sort(want_ids))
    np.testing.assert_allclose(dense, want_dense, rtol=2e-5, atol=1e-7)


def test_clamped_swiglu_is_what_gpt_oss_computes(tmp_path: Path) -> None:
    spec = spec_of("gpt-oss", tmp_path)
    experts = module_of("gpt-oss").GptOssExperts(config_of("gpt-oss"))
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
    shared = spec.shared_experts.count * spec.shared_experts.intermediate_size
    moe = 3 * hidden * (experts * spec.intermediate_size + shared) + experts * hidden
    if spec.expert_bias:
        moe += experts * (2 * spec.intermediate_size + hidden)
    dense = 3 * hidden * (spec.dense_intermediate_size or 0)
    embeddings = spec.vocab_size * hidden * (1 if spec.tie_embeddings else 2)
    return embeddings + spec.layers * attention + len(spec.moe_layers) * moe + len(spec.dense_layers) * dense


@pytest.mark.parametrize("case", CASES)
def test_layers_and_parameters_are_those_of_the_real_model(case: str, tmp_path: Path) -> None:
    spec = spec_of(case, tmp_path)
    with torch.device("meta"):
        model = getattr(module_of(case), f"{CASES[case][0]}ForCausalLM")(config_of(case))
    moe = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert spec.moe_layers == moe
    assert sorted(spec.moe_layers + spec.dense_layers) == list(range(spec.layers))
    assert matrix_parameters(spec) == sum(p.numel() for p in model.parameters() if p.ndim > 1)


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
    everywhere = spec_of("mixtral", tmp_path).attention
    assert everywhere is not None
    assert (everywhere.sliding_window, everywhere.window_layers) == (7, (0, 1, 2, 3))


def test_mla_caches_one_latent_and_one_rotary_key() -> None:
    attention = load_preset("deepseek-v3").attention
    assert attention is not None
    assert attention.kv_elements == 576


def test_what_the_config_does_not_settle_is_noted(tmp_path: Path) -> None:
    assert any("fp8" in note for note in load_preset("deepseek-v3").notes)
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    config = {**CASES["qwen3"][2], "model_type": "qwen3_moe"}
    del config["dtype"]
    path.write_text(json.dumps(config))
    spec = load_hf_config(path)
    assert spec.name == "tiny"
    assert spec.notes == ("the config names no dtype: bfloat16 is assumed",)


def test_old_and_new_spellings_are_one_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {**CASES["qwen3"][2], "model_type": "qwen3_moe", "num_local_experts": 16}
    path.write_text(json.dumps(config))
    assert load_hf_config(path).experts == 16
    path.write_text(json.dumps({**config, "num_local_experts": 8}))
    with pytest.raises(InputError, match="num_experts and num_local_experts disagree"):
        load_hf_config(path)
