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
FAMILIES = "mixtral, qwen3_moe, olmoe, deepseek_v3, kimi_k2, gpt_oss"
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
