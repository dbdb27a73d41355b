"""Wrong config.json files: each is one located line with a hint, and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecc.errors import InputError
from moecc.frontend.hf_config import load_hf_config, load_preset

GOOD: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 100,
    "num_attention_heads": 4,
}
DEEPSEEK: dict[str, Any] = {
    **GOOD,
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
DEEPSEEK.pop("num_experts")
QWEN2: dict[str, Any] = {
    **GOOD,
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 48,
    "num_key_value_heads": 2,
}
LOCAL: dict[str, Any] = {
    "model_type": "phimoe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ERNIE: dict[str, Any] = {
    **LOCAL,
    "model_type": "ernie4_5_moe",
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 1,
    "moe_num_experts": 8,
    "moe_k": 2,
}
NEMOTRON: dict[str, Any] = {
    **LOCAL,
    "model_type": "nemotron_h",
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_shared_expert_intermediate_size": 48,
    "hybrid_override_pattern": "MEM*",
}
FAMILIES = (
    "mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, kimi_k2, glm4_moe, gpt_oss, granitemoe, phimoe, "
    "ernie4_5_moe, minimax_m2, jamba, nemotron_h"
)
INLINE = "hidden_size, moe_layers, experts, top_k, intermediate_size, router"


def text(base: dict[str, Any] = GOOD, /, **changes: Any) -> bytes:
    """One field a line, in order: line n + 2 is the n-th field."""
    return json.dumps({**base, **changes}, indent=2).encode()


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (
        b"",
        "1:1: malformed JSON: expecting value; hint: mend the JSON, or download the config.json again",
    ),
    "comma": (
        b'{\n  "a": 1,\n}',
        # the wording of the json module changed in Python 3.13, so the expectation stops before it
        "",
    ),
    "unclosed": (
        b'{"a": 1',
        "1:8: malformed JSON: expecting ',' delimiter; hint: mend the JSON, or download the config.json again",
    ),
    "list": (b"[1]", "1:1: a JSON object is expected, not a list; hint: give a config.json"),
    "nan": (b'{"a": NaN}', "1:1: NaN is not allowed; hint: mend the JSON"),
    "twice": (b'{"a": 1, "a": 2}', "1:1: the key 'a' is written twice; hint: mend the JSON"),
    "utf8": (b'{\n "a": "\xff"}', "2:8: the byte 0xff is not UTF-8; hint: save the file as UTF-8"),
    "deep": (b"[" * 100_000, "1:1: the JSON is nested too deeply; hint: give a config.json"),
    "no family": (
        b"{}",
        f" model_type is missing; hint: known families: {FAMILIES}; or write the fields inline: {INLINE}",
    ),
    "unknown family": (
        text(model_type="foo"),
        f"2:17: unknown family 'foo' (known: {FAMILIES}); hint: write the fields inline: {INLINE}",
    ),
    "family is a number": (
        text(model_type=3),
        f"2:17: model_type is missing; hint: known families: {FAMILIES}; or write the fields inline: {INLINE}",
    ),
    "missing": (
        b'{"model_type": "mixtral", "hidden_size": 8, "vocab_size": null}',
        " 6 fields are missing for family 'mixtral': num_hidden_layers, num_local_experts, num_experts_per_tok, "
        "intermediate_size, vocab_size, num_attention_heads; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "missing one": (
        text(vocab_size=None),
        " 1 field is missing for family 'qwen3_moe': vocab_size; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "missing for dense layers": (
        text(mlp_only_layers=[0]),
        " 1 field is missing for family 'qwen3_moe': intermediate_size; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "string size": (
        text(hidden_size="64"),
        "3:18: hidden_size must be an integer, not the string '64'; hint: write a JSON integer",
    ),
    "bool size": (
        text(hidden_size=True),
        "3:18: hidden_size must be an integer, not the boolean true; hint: write a JSON integer",
    ),
    "zero layers": (
        text(num_hidden_layers=0),
        "4:24: num_hidden_layers 0 is too small; hint: it must be at least 1",
    ),
    "absurd layers": (
        text(num_hidden_layers=10**12),
        "4:24: num_hidden_layers 1000000000000 is out of range; hint: it must be in [1, 4096]",
    ),
    "top_k": (
        text(num_experts_per_tok=300),
        "6:26: top_k 300 is larger than experts 8; hint: top_k must be in [1, 8]",
    ),
    "absurd experts": (
        text(num_experts=10**6),
        "5:18: experts 1000000 is out of range; hint: experts must be in [1, 32767]",
    ),
    "bad flag": (
        text(norm_topk_prob=1),
        "10:21: norm_topk_prob must be true or false, not the number 1; hint: write true or false",
    ),
    "bad list": (
        text(mlp_only_layers="0"),
        "10:22: mlp_only_layers must be a list of int, not the string '0'; hint: write a JSON list",
    ),
    "all dense": (
        text(mlp_only_layers=[0, 1, 2, 3], intermediate_size=64),
        " the model has no MoE layer; hint: moecc compiles models with MoE layers",
    ),
    "activation": (
        text(hidden_act="relu"),
        "10:17: hidden_act 'relu' is not supported; hint: silu and gelu are",
    ),
    "dtype": (
        text(torch_dtype="float8_e4m3fn"),
        "10:18: torch_dtype 'float8_e4m3fn' is not supported; hint: one of bfloat16, float16, float32",
    ),
    "kv heads": (
        text(num_key_value_heads=3),
        "10:26: kv_heads 3 do not divide heads 4; hint: every KV head serves the same number of query heads",
    ),
    "groups": (
        text(DEEPSEEK, n_group=3),
        "12:14: groups 3 do not divide experts 8; hint: groups must be one of 1, 2, 4, 8",
    ),
    "top groups": (
        text(DEEPSEEK, topk_group=5),
        "13:17: top_groups 5 is larger than groups 4; hint: top_groups must be in [1, 4]",
    ),
    "top_k of groups": (
        text(DEEPSEEK, num_experts_per_tok=5),
        "13:17: top_k 5 is larger than the 4 experts of top_groups 2; hint: top_groups must be at least 3",
    ),
    "groups of one": (
        text(DEEPSEEK, n_group=8),
        "12:14: groups of one expert have no top-2 sum; hint: use at most 4 groups",
    ),
    "scale": (
        text(DEEPSEEK, routed_scaling_factor="2.5"),
        "14:28: routed_scaling_factor must be a finite number, not the string '2.5'; hint: write a JSON number",
    ),
    "score": (
        text(DEEPSEEK, scoring_func="softmax"),
        "21:19: scoring_func 'softmax' is not supported; hint: deepseek_v3 computes 'sigmoid'",
    ),
    "no width of the shared expert": (
        text(QWEN2, shared_expert_intermediate_size=None),
        " 1 field is missing for family 'qwen2_moe': shared_expert_intermediate_size; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "window of no token": (
        text(QWEN2, use_sliding_window=True, sliding_window=0),
        "13:21: sliding_window 0 is too small; hint: it must be at least 1",
    ),
    "sparsemixer of three": (
        text(LOCAL, num_experts_per_tok=3),
        "6:26: num_experts_per_tok 3 is not what sparsemixer takes; hint: it takes 2 experts",
    ),
    "negative jitter": (
        text(LOCAL, router_jitter_noise=-0.5),
        "11:26: jitter -0.5 is out of range; hint: jitter must be 0 or larger",
    ),
    "deepseek-v2 normalises": (
        text(DEEPSEEK, model_type="deepseek_v2"),
        "15:21: norm_topk_prob true is not what transformers' DeepSeek-V2 computes; hint: false is supported",
    ),
    "deepseek-v2 method": (
        text(DEEPSEEK, model_type="deepseek_v2", norm_topk_prob=False, topk_method="noaux_tc"),
        "21:18: topk_method 'noaux_tc' is not supported; hint: greedy and group_limited_greedy are",
    ),
    "deepseek-v2 groups": (
        text(
            DEEPSEEK,
            model_type="deepseek_v2",
            norm_topk_prob=False,
            topk_method="group_limited_greedy",
            n_group=None,
        ),
        " 1 field is missing for family 'deepseek_v2': n_group; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "deepseek-v2 biases": (
        text(DEEPSEEK, model_type="deepseek_v2", mlp_bias=True),
        "21:15: mlp_bias adds biases to shared experts, which are not supported; hint: false is supported",
    ),
    "minimax score": (
        text(LOCAL, model_type="minimax_m2", head_dim=16, scoring_func="softmax"),
        "12:19: scoring_func 'softmax' is not supported; hint: minimax_m2 computes 'sigmoid'",
    ),
    "ernie biases": (
        text(ERNIE, use_bias=True),
        "15:15: use_bias adds biases to shared experts, which are not supported; hint: false is supported",
    ),
    "ernie without experts": (
        text(ERNIE, moe_layer_start_index=4),
        " the model has no MoE layer; hint: moecc compiles models with MoE layers",
    ),
    "ernie ends before it starts": (
        text(ERNIE, moe_layer_end_index=-2),
        "15:26: moe_layer_end_index -2 is too small; hint: it must be at least -1",
    ),
    "jamba offset": (
        text(LOCAL, model_type="jamba", expert_layer_period=2, expert_layer_offset=2),
        "12:26: expert_layer_offset 2 is not smaller than the period 2; hint: it must be in [0, 1]",
    ),
    "jamba without experts": (
        text(LOCAL, model_type="jamba", num_local_experts=1, num_experts_per_tok=1),
        " the model has no MoE layer; hint: moecc compiles models with MoE layers",
    ),
    "jamba rank": (
        text(LOCAL, model_type="jamba", mamba_dt_rank="many"),
        "11:20: mamba_dt_rank must be an integer, not the string 'many'; hint: write a JSON integer",
    ),
    "nemotron letter": (
        text(NEMOTRON, hybrid_override_pattern="MEX*"),
        "18:30: hybrid_override_pattern names an unknown layer 'X'; hint: known: M, *, -, E",
    ),
    "nemotron layers": (
        text(NEMOTRON, hybrid_override_pattern="MEM"),
        "18:30: hybrid_override_pattern has 3 items for 4 layers; hint: one for each layer",
    ),
    "nemotron name": (
        text(NEMOTRON, layers_block_type=["moe", "dense"]),
        "19:24: layers_block_type names an unknown layer 'dense'; "
        "hint: known: mamba, attention, mlp, moe, linear_attention, full_attention",
    ),
    "nemotron without pattern": (
        text(NEMOTRON, hybrid_override_pattern=None),
        " 1 field is missing for family 'nemotron_h': hybrid_override_pattern; "
        "hint: download the model's config.json again, or write the fields inline in model.yaml",
    ),
    "nemotron latent": (
        text(NEMOTRON, moe_latent_size=16),
        "19:22: moe_latent_size puts experts between two projections of their own, which is not supported; "
        "hint: null is supported",
    ),
    "nemotron activation": (
        text(NEMOTRON, mlp_hidden_act="tanh"),
        "19:21: mlp_hidden_act 'tanh' is not supported; hint: relu2, relu, silu, gelu are",
    ),
    "nemotron state": (
        text(NEMOTRON, mamba_ssm_cache_dtype="int8"),
        "19:28: mamba_ssm_cache_dtype 'int8' is not supported; hint: one of bfloat16, float16, float32",
    ),
    "layer types": (
        text(model_type="gpt_oss", intermediate_size=32, layer_types=["full_attention"]),
        "11:18: layer_types has 1 items for 4 layers; hint: one for each layer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_config_is_one_located_line(case: str, tmp_path: Path) -> None:
    content, want = CASES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_hf_config(path)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert line.startswith(f"{path}:")
    if want:
        assert line == f"{path}:{want}"


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_hf_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/config.json: cannot be read: No such file or directory; "
        "hint: give a config.json or the folder that holds one"
    )


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(InputError) as caught:
        load_preset("qwen3-30b", where="model.yaml:3:11")
    assert (
        str(caught.value)
        == "model.yaml:3:11: unknown preset 'qwen3-30b'; hint: did you mean 'qwen3-30b-a3b'?"
    )
