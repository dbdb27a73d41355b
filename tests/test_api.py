"""moecc.compile_model makes the artifact that `moecc compile` makes of the same words in a model.yaml."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import moecc
from moecc.artifact import load_artifact
from moecc.errors import InputError, MoeccError
from moecc.frontend.spec import ClusterSpec
from moecc.solvers.routing import Routing, assumed_routing

CLUSTER = {"device": "x86", "nodes": 1, "devices_per_node": 2}
SERVING = {"tokens_per_device": {"decode": 8, "prefill": 64}}
PLACEMENT = {"time_limit_s": 1, "max_imbalance": 1.5}
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
}


def config(**values: Any) -> Any:
    return transformers.OlmoeConfig(**(CONFIG | values))


def recorded(name: str, seed: int = 0, **sizes: int) -> Routing:
    """As if it had been measured."""
    shape = {"layers": 2, "experts": 8, "top_k": 2, "tokens": 512} | sizes
    return replace(assumed_routing("zipf", seed=seed, **shape), name=name, assumption="")


def test_the_artifact_is_that_of_the_command_line(tmp_path: Path) -> None:
    """A routing at hand and one in a file against two files that a model.yaml names."""
    chat, code = recorded("chat", 1), recorded("code", 2)
    for each in (chat, code):
        moecc.save_trace(tmp_path / f"{each.name}.npz", each)
    model = transformers.OlmoeForCausalLM(config(dtype="float32")).bfloat16()
    ours = moecc.compile_model(
        model,
        cluster=ClusterSpec(**CLUSTER),
        traces=[chat, tmp_path / "code.npz"],
        serving=SERVING,
        placement=PLACEMENT,
        targets=("x86",),
        output=tmp_path / "ours",
    )
    config(dtype="bfloat16").save_pretrained(tmp_path)
    document = {
        "moecc": 1,
        "model": {"hf_config": "config.json"},
        "cluster": CLUSTER,
        "workloads": [{"name": name, "trace": f"{name}.npz"} for name in ("chat", "code")],
        "serving": SERVING,
        "placement": PLACEMENT,
        "targets": ["x86"],
    }
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "moecc", "compile", tmp_path / "model.yaml", "-o", tmp_path / "theirs"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = load_artifact(tmp_path / "theirs")
    for name in ("kernels/moe_decode.py", "kernels/x86/moe_decode.gate_up.s"):
        assert ours.manifest["files"][name] == theirs.manifest["files"][name]
    a, b = ours.json("report.json"), theirs.json("report.json")
    assert a["steps"] == b["steps"]
    assert a["placement"]["held_out_tokens"] == b["placement"]["held_out_tokens"]
    assert (
        ours.json("placement.json")["physical_to_logical_map"]
        == theirs.json("placement.json")["physical_to_logical_map"]
    )
    assert set(ours.manifest["inputs"]) == {"config.json", "trace:chat", "trace:code"}
    assert load_artifact(tmp_path / "ours").manifest == ours.manifest


def test_tracing_and_placing_in_one_go(tmp_path: Path) -> None:
    model = transformers.OlmoeForCausalLM(config())
    batches = [torch.randint(0, 64, (4, 16)) for _ in range(4)]
    artifact = moecc.compile_model(
        model,
        cluster=CLUSTER,
        traces=[moecc.trace(model, batches, name="chat")],
        placement=PLACEMENT,
        output=tmp_path / "out",
    )
    assert artifact.json("report.json")["placement"]["held_out_tokens"] == {"chat": 128}
    assert not any("assumed" in note for note in artifact.json("report.json")["notes"])


def test_without_traces_the_report_says_what_is_assumed(tmp_path: Path) -> None:
    artifact = moecc.compile_model(
        config(), cluster={"device": "x86", "devices_per_node": 1}, output=tmp_path / "out"
    )
    notes = artifact.json("report.json")["notes"]
    assert "no workloads are given: uniform routing is assumed" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster": {**CLUSTER, "device": "h100"}}, "cluster.device: "),
        ({"cluster": {"device": "x86"}}, "cluster: 'devices_per_node' is missing in cluster; hint: "),
        (
            {"cluster": {**CLUSTER, "nodes": 0}},
            "cluster.nodes: nodes 0 is out of range; hint: nodes must be at least 1",
        ),
        ({"cluster": {**CLUSTER, "node": 1}}, "cluster.node: unknown key 'node' in cluster"),
        ({"cluster": "8x h100-sxm"}, "cluster: cluster must be a mapping, not the string '8x h100-sxm'"),
        (
            {"serving": {"tokens_per_device": {"decode": "8"}}},
            "serving.tokens_per_device.decode: decode must be an integer",
        ),
        (
            {"placement": {"slots_per_device": 3}},
            "placement.slots_per_device: slots_per_device 3 on 2 devices cannot hold 8 experts",
        ),
        (
            {"placement": {"objective": "speed"}},
            "placement.objective: objective cannot be the string 'speed'",
        ),
        ({"targets": ["x86", "x86"]}, "targets[1]: the target x86 is listed twice; hint: remove one of them"),
        ({"targets": ["sm_1"]}, "targets[0]: "),
        ({"traces": recorded("chat")}, "traces: a Routing, not a list of traces; hint: write traces=[...]"),
        ({"traces": [3]}, "traces[0]: a int is no trace; hint: give what moecc.trace returned"),
        (
            {"traces": [recorded("a"), recorded("a")]},
            "traces[1]: the workload name 'a' is used twice; hint: name them",
        ),
        (
            {"traces": [recorded("a", layers=3)]},
            "traces['a']: the trace 'a' has 3 layers, the model has 2 MoE layers",
        ),
        (
            {"traces": {"b": recorded("a", experts=9)}},
            "traces['b']: the trace 'a' has 9 experts, the model has 8 experts",
        ),
        ({"traces": ["none.npz"]}, "none.npz: there is no such file"),
        (
            {"model": torch.nn.Linear(2, 2)},
            "model: a Linear has no config; hint: give a transformers model or its config",
        ),
        ({"model": transformers.LlamaConfig()}, "model.config: unknown family 'llama'"),
        ({"model": config(num_experts_per_tok=9)}, "model.config: top_k 9 is larger than experts 8"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"cluster": CLUSTER, "output": tmp_path / "out", **arguments}
    with pytest.raises(InputError) as error:
        moecc.compile_model(call.pop("model", config()), **call)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_fails_at_the_cluster(tmp_path: Path) -> None:
    large = config(hidden_size=8192, intermediate_size=65536)
    with pytest.raises(MoeccError, match="^cluster: one device needs"):
        moecc.compile_model(large, cluster=CLUSTER, output=tmp_path / "out")


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^module 'moecc' has no attribute 'nothing'$"):
        moecc.nothing  # noqa: B018
