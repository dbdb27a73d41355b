"""Wrong model.yaml files: the exact line that a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.frontend.model_yaml import load_model_yaml

GOOD = """\
moecc: 1
model:
  hidden_size: 2048
  moe_layers: 3
  experts: 128
  top_k: 8
  intermediate_size: 768
  router: {score: softmax}
cluster:
  device: h100-sxm
  devices_per_node: 8
"""
PRESET = "moecc: 1\nmodel: {preset: qwen3-30b-a3b}\ncluster: {device: h100-sxm, devices_per_node: 8}\n"


def edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def more(text: str) -> str:
    return GOOD + text


SYNTAX = "close quotes and brackets, and indent with spaces"
CASES: dict[str, tuple[str | bytes, str]] = {
    # the text
    "empty": ("", "1:1: the file is empty; hint: start it with 'moecc: 1'"),
    "comment only": ("# nothing\n", "1:1: the file is empty; hint: start it with 'moecc: 1'"),
    "list": ("- 1\n", "1:1: a mapping is expected, not a list; hint: write 'key: value' lines"),
    "tab": (
        edit("  top_k", "\ttop_k"),
        "6:1: found character '\\t' that cannot start any token; hint: indent with spaces, not tabs",
    ),
    "not utf-8": (
        GOOD.encode().replace(b"h100", b"h\xff00"),
        "10:12: the byte 0xff is not UTF-8; hint: save the file as UTF-8",
    ),
    "utf-16": (GOOD.encode("utf-16"), "1:1: the byte 0xff is not UTF-8; hint: save the file as UTF-8"),
    "nul": (edit("h100", "h\0"), "10:12: the character '\\x00' is not allowed in YAML; hint: remove it"),
    "two documents": (
        more("---\na: 1\n"),
        "12:1: a second document begins here; hint: keep one document and remove the line '---'",
    ),
    "twice": (
        more("cluster: {}\n"),
        "12:1: the key 'cluster' is written twice, first in line 9; hint: remove one of them",
    ),
    "twice inside": (
        edit("  top_k: 8", "  top_k: 8\n  top_k: 9"),
        "7:3: the key 'top_k' is written twice, first in line 6; hint: remove one of them",
    ),
    "alias": (
        edit("{score: softmax}", "&r {score: softmax}\n  shared_experts: *r"),
        "9:19: the alias *r is not allowed; hint: write the value out",
    ),
    "bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "2:8: the alias *a is not allowed; hint: write the value out",
    ),
    "deep": (
        "a: " + "[" * 5000,
        "1:35: nesting is deeper than 32 levels; hint: a model.yaml needs four levels",
    ),
    "number as key": (more("1: x\n"), "12:1: a key must be a string; hint: put it in quotes, or remove it"),
    "list as key": (
        more("? [a]\n: b\n"),
        "12:3: a key must be a string; hint: put it in quotes, or remove it",
    ),
    "tag": (
        edit("h100-sxm", "!!python/name:os.system"),
        "10:11: the tag !!python/name:os.system is not allowed; hint: write the plain value",
    ),
    "own tag": (edit("h100-sxm", "!x {}"), "10:11: the tag !x is not allowed; hint: write the plain value"),
    "unclosed": (
        edit("{score: softmax}", "{score: softmax"),
        f"9:8: expected ',' or '}}', but got ':'; hint: {SYNTAX}",
    ),
    "indentation": (
        edit("  top_k: 8", "    top_k: 8"),
        "6:10: mapping values are not allowed here; hint: indent the line, or quote a value that holds ': '",
    ),
    "long number": (
        edit("top_k: 8", f"top_k: {'9' * 5000}"),
        "6:10: the number is too large; hint: write a smaller number",
    ),
    # keys
    "no version": (
        edit("moecc: 1\n", ""),
        "1:1: 'moecc' is missing; hint: start the file with 'moecc: 1'",
    ),
    "version": (
        edit("moecc: 1", "moecc: 2"),
        "1:8: format the number 2 is not supported; hint: this moecc reads 'moecc: 1'",
    ),
    "no cluster": (
        GOOD[: GOOD.index("cluster")],
        "1:1: 'cluster' is missing; hint: write 'cluster: {device: h100-sxm, nodes: 1, devices_per_node: 8}'",
    ),
    "missing fields": (
        edit("  experts: 128\n  top_k: 8\n", ""),
        "2:1: 'experts', 'top_k' are missing in model; hint: add the line experts: ...",
    ),
    "no router": (
        edit("  router: {score: softmax}\n", ""),
        "2:1: 'router' is missing in model; hint: write 'router: {score: softmax, normalize: true}'",
    ),
    "unknown key": (edit("top_k:", "topk:"), "6:3: unknown key 'topk' in model; hint: did you mean 'top_k'?"),
    "unknown key, nothing near": (
        edit("device:", "zzz: 1\n  device:"),
        "10:3: unknown key 'zzz' in cluster; hint: known: device, devices_per_node, nodes",
    ),
    "unknown section": (
        more("plaement: {}\n"),
        "12:1: unknown key 'plaement'; hint: did you mean 'placement'?",
    ),
    "unknown key in a list": (
        more("workloads:\n  - {name: a, routing: uniform, wieght: 1}\n"),
        "13:33: unknown key 'wieght' in workloads.1; hint: did you mean 'weight'?",
    ),
    "field beside a preset": (
        PRESET.replace("{preset", "{top_k: 4, preset"),
        "2:9: 'top_k' cannot stand beside 'preset'; "
        "hint: remove it, or remove preset and write all fields of the model",
    ),
    "preset beside hf_config": (
        PRESET.replace("{preset", "{hf_config: c.json, preset"),
        "2:28: 'preset' cannot stand beside 'hf_config'; "
        "hint: remove it, or remove hf_config and write all fields of the model",
    ),
    "unknown preset": (
        PRESET.replace("a3b", "a4b"),
        "2:17: unknown preset 'qwen3-30b-a4b'; hint: did you mean 'qwen3-30b-a3b'?",
    ),
    "no hf_config": (
        PRESET.replace("preset: qwen3-30b-a3b", "hf_config: none.json"),
        "2:20: there is no file 'none.json'; hint: paths are relative to the folder of model.yaml",
    ),
    # single values
    "string for a number": (
        edit("experts: 128", "experts: '128'"),
        "5:12: experts must be an integer, not the string '128'; "
        "hint: write an integer without quotes and without a point",
    ),
    "float for an integer": (
        edit("experts: 128", "experts: 128.0"),
        "5:12: experts must be an integer, not the number 128; "
        "hint: write an integer without quotes and without a point",
    ),
    "true for an integer": (
        edit("experts: 128", "experts: true"),
        "5:12: experts must be an integer, not the boolean true; "
        "hint: write an integer without quotes and without a point",
    ),
    "nothing for an integer": (
        edit("experts: 128", "experts:"),
        "5:11: experts must be an integer, not null; hint: write an integer without quotes and without a point",
    ),
    "zero": (edit("top_k: 8", "top_k: 0"), "6:10: top_k 0 is out of range; hint: top_k must be at least 1"),
    "number for a string": (
        edit("h100-sxm", "100"),
        "10:11: device must be a string, not the number 100; hint: put it in quotes",
    ),
    "string for a mapping": (
        edit("{score: softmax}", "softmax"),
        "8:11: router must be a mapping, not the string 'softmax'; hint: write 'key: value' lines below it",
    ),
    "mapping for a list": (
        more("workloads: {name: a}\n"),
        "12:12: workloads must be a list, not a mapping; hint: write [..., ...]",
    ),
    "infinite": (
        more("placement: {time_limit_s: 1e999}\n"),
        "12:27: time_limit_s must be a finite number, not a huge number; hint: write a smaller number",
    ),
    "not a number": (
        more("placement: {time_limit_s: .nan}\n"),
        "12:27: time_limit_s must be a number, not the string '.nan'; hint: write a number without quotes",
    ),
    "imbalance": (
        more("placement: {max_imbalance: 0.5}\n"),
        "12:28: max_imbalance 0.5 is out of range; hint: max_imbalance must be at least 1.0",
    ),
    "empty text": (
        edit("h100-sxm", "''"),
        "10:11: device is not a printable text; hint: write 1 to 4096 printable characters",
    ),
    "execution": (
        more("serving: {execution: hom}\n"),
        "12:22: execution cannot be the string 'hom'; hint: did you mean 'home'?",
    ),
    "dtype": (
        edit("  router", "  dtype: fp8\n  router"),
        "8:10: dtype cannot be the string 'fp8'; hint: known: bfloat16, float16, float32",
    ),
    "activation": (
        edit("  router", "  activation: silu_gl\n  router"),
        "8:15: activation cannot be the string 'silu_gl'; hint: did you mean 'silu_glu'?",
    ),
    "bias": (
        edit("{score: softmax}", "{bias: true}"),
        "8:18: bias cannot be the boolean true; hint: none, logits (added before scoring, gpt-oss), "
        "selection (for selection only, DeepSeek-V3) or both",
    ),
    "target": (
        more("targets: [sm_90, sm_89]\n"),
        "12:18: targets cannot be the string 'sm_89'; hint: did you mean 'sm_90'?",
    ),
    "targets empty": (
        more("targets: []\n"),
        "12:10: targets is empty; hint: list at least one, or leave the key out",
    ),
    "target twice": (
        more("targets: [x86, x86]\n"),
        "12:16: the target x86 is listed twice; hint: remove one of them",
    ),
    # values that contradict each other
    "top_k": (
        edit("top_k: 8", "top_k: 300"),
        "6:10: top_k 300 is larger than experts 128; hint: top_k must be in [1, 128]",
    ),
    "groups": (
        edit("{score: softmax}", "{groups: 7, top_groups: 2}"),
        "8:20: groups 7 do not divide experts 128; hint: groups must be one of 1, 2, 4, 8, 16, 32, 64, 128",
    ),
    "top_k of groups": (
        edit("{score: softmax}", "{groups: 32, top_groups: 1}"),
        "8:36: top_k 8 is larger than the 4 experts of top_groups 1; hint: top_groups must be at least 2",
    ),
    "groups alone": (
        edit("{score: softmax}", "{groups: 8}"),
        "8:20: groups have no effect without top_groups; hint: add top_groups in [1, 8]",
    ),
    "select_first": (
        edit("{score: softmax}", "{select_first: true, normalize: true}"),
        "8:26: select_first scores the selected logits only: groups, selection bias and normalize do not apply; "
        "hint: remove them, or remove select_first",
    ),
    "sparsemixer with groups": (
        edit("{score: softmax}", "{score: sparsemixer, groups: 2, top_groups: 1}"),
        "8:19: sparsemixer takes experts by their logits alone: select_first, selection bias and groups do not apply; "
        "hint: remove them, or use another score",
    ),
    "sparsemixer normalised": (
        edit("{score: softmax}", "{score: sparsemixer, normalize: true}"),
        "8:43: sparsemixer's weights are never normalised; hint: remove normalize",
    ),
    "idle jitter": (
        edit("{score: softmax}", "{score: softmax, jitter: 0.01}"),
        "8:36: jitter has no effect on softmax; hint: write score: sparsemixer",
    ),
    "two experts behind a gate": (
        edit("  router", "  shared_experts: {count: 2, gated: true}\n  router"),
        "8:37: a gate weights one shared expert, not 2; hint: write count: 1 and the width of all, or remove gated",
    ),
    "idle norm_eps": (
        edit("{score: softmax}", "{norm_eps: 1e-20}"),
        "8:22: norm_eps has no effect without normalize; hint: add normalize: true",
    ),
    "idle limit": (
        edit("  router", "  activation: {kind: silu_glu, limit: 7}\n  router"),
        "8:39: limit has no effect on silu_glu; hint: remove it, or write kind: clamped_swiglu",
    ),
    "no gate by a slip": (
        edit("  router", "  activation: silu\n  router"),
        "8:15: experts with silu have no gate; hint: write silu_glu, or {kind: silu, gated: false}",
    ),
    "no gate nor its product": (
        edit("  router", "  activation: {kind: silu_glu, gated: false}\n  router"),
        "8:15: experts with silu_glu have a gate; hint: remove gated: false",
    ),
    "dense layer outside": (
        edit("moe_layers: 3", "moe_layers: 3\n  dense_layers: [4]"),
        "5:18: the dense layer 4 is outside the model; "
        "hint: moe_layers and dense_layers together have indices 0 to 3",
    ),
    "dense layer twice": (
        edit("moe_layers: 3", "moe_layers: 3\n  dense_layers: [0, 0]"),
        "5:21: the dense layer 0 is listed twice; hint: remove one of them",
    ),
    "absurd layers": (
        edit("moe_layers: 3", "moe_layers: 1000000000"),
        "4:15: moe_layers 1000000000 is out of range; hint: a model may have at most 4096 layers",
    ),
    "mla without ranks": (
        edit("  router", "  attention: {kind: mla, heads: 8, head_dim: 8}\n  router"),
        "8:14: mla attention needs kv_lora_rank; hint: kv_lora_rank must be in [1, 16777216]",
    ),
    "too few slots": (
        more("placement: {slots_per_device: 15}\n"),
        "12:31: slots_per_device 15 on 8 devices cannot hold 128 experts; hint: slots_per_device must be in [16, 128]",
    ),
    "too many slots": (
        more("placement: {slots_per_device: 129}\n"),
        "12:31: slots_per_device 129 is larger than experts 128; hint: slots_per_device must be in [16, 128]",
    ),
    "too little memory": (
        more("placement: {memory_per_device_gb: 0.1}\n"),
        "12:35: 0.1 GB hold 3 slots of 3 layers x 9.437 MB: 8 devices cannot hold 128 experts; "
        "hint: 16 slots need 0.453 GB on every device; or use more devices",
    ),
    "memory below the slots": (
        more("placement: {slots_per_device: 17, memory_per_device_gb: 0.46}\n"),
        "12:57: 17 slots per device of 3 layers x 9.437 MB need 0.4813 GB, not 0.46; "
        "hint: the memory holds 16: leave out slots_per_device, or lower it",
    ),
    "workload twice": (
        more("workloads:\n  - {name: a, routing: uniform}\n  - {name: a, routing: zipf}\n"),
        "14:12: the workload name 'a' is used twice; hint: give every workload its own name",
    ),
    "workload of nothing": (
        more("workloads:\n  - {name: a}\n"),
        "13:5: workload 'a' has neither trace nor routing; "
        "hint: give exactly one: trace: FILE.npz, or routing: uniform or zipf",
    ),
    "workload of both": (
        more("workloads:\n  - {name: a, trace: a.npz, routing: zipf}\n"),
        "13:38: workload 'a' has both trace and routing; "
        "hint: give exactly one: trace: FILE.npz, or routing: uniform or zipf",
    ),
    "idle alpha": (
        more("workloads:\n  - {name: a, routing: uniform, alpha: 2}\n"),
        "13:40: alpha is for zipf routing only; hint: remove it, or write routing: zipf",
    ),
    "no trace": (
        more("workloads:\n  - {name: a, trace: t/a.npz}\n"),
        "13:22: there is no file 't/a.npz'; hint: paths are relative to the folder of model.yaml",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_one_located_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, want = CASES[case]
    (tmp_path / "model.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_model_yaml(Path("model.yaml"))
    assert str(caught.value) == f"model.yaml:{want}"
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_model_yaml(tmp_path / "model.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/model.yaml: cannot be read: No such file or directory; hint: give the path of a model.yaml"
    )


def test_a_file_that_is_far_too_large(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError, match="the file is larger than 1048576 bytes"):
        load_model_yaml(tmp_path / "model.yaml")


def test_words_of_old_yaml_are_words(tmp_path: Path) -> None:
    """`no`, `on` and `12:30` are a boolean, a boolean and 750 in YAML 1.1; nobody means that in a name."""
    text = (
        GOOD
        + "workloads:\n"
        + "".join(f"  - {{name: {w}, routing: uniform}}\n" for w in ("no", "on", "1:30"))
    )
    (tmp_path / "model.yaml").write_text(text)
    assert [w.name for w in load_model_yaml(tmp_path / "model.yaml").workloads] == ["no", "on", "1:30"]
