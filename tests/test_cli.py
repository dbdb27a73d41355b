"""The command line as a user meets it: exit codes, one-line errors, artifacts that are complete or absent."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moecc.artifact import load_artifact
from moecc.frontend.hf_config import preset_names

YAML = """\
moecc: 1
model:
  name: small
  hidden_size: 64
  moe_layers: 2
  experts: 8
  top_k: 2
  intermediate_size: 32
  router: {{score: softmax, normalize: true}}
  dtype: bfloat16
cluster: {{device: h100-sxm, nodes: 1, devices_per_node: {devices}}}
workloads:
  - {{name: assumed, routing: zipf, alpha: 0.8}}
serving: {{tokens_per_device: {{decode: 32, prefill: 1500}}}}
placement: {{time_limit_s: 2, max_imbalance: 1.2}}
targets: [sm_90, x86]
"""


def moecc(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moecc", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def assert_one_line_error(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0]


def write_yaml(folder: Path, devices: int = 4) -> Path:
    path = folder / "model.yaml"
    path.write_text(YAML.format(devices=devices))
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("compiled")
    result = moecc("compile", write_yaml(folder), "-o", folder / "out")
    assert result.returncode == 0, result.stderr
    return folder / "out", result


def test_the_artifact_holds_what_carries_the_decisions_out(compiled: Any) -> None:
    artifact = load_artifact(compiled[0])
    files = set(artifact.manifest["files"])
    assert {
        f"ir/0{i}-{name}.moe"
        for i, name in enumerate(["import", "normalize", "place", "overlap", "fuse", "lower"])
    } < files
    assert {"placement.json", "schedule.json", "timeline.json", "report.json"} < files
    assert {"kernels/moe_decode.py", "kernels/moe_prefill.py"} < files
    assert any(name.endswith(".cubin") for name in files)
    assert {"kernels/x86/moe_decode.gate_up.s", "kernels/x86/moe_decode.gate_up.so"} < files
    assert artifact.manifest["inputs"].keys() == {"model.yaml"}
    kernels = artifact.json("report.json")["kernels"]
    assert {row["kernel"] for row in kernels} >= {"router", "plan", "scatter", "gate_up", "down"}
    assert all(row["spill_bytes"] == (0 if row["target"] == "sm_90" else None) for row in kernels)


def test_the_table_goes_to_stdout_and_progress_to_stderr(compiled: Any) -> None:
    result = compiled[1]
    for title in (
        "Placement, judged on",
        "Predicted step time",
        "Kernels",
        "Memory of one device",
        "assumed routing",
    ):
        assert title in result.stdout
    for stage in ("normalize", "place", "overlap", "kernels"):
        assert stage in result.stderr
        assert f"{stage}  " not in result.stdout


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_run_agrees_with_the_reference(compiled: Any, tokens: int) -> None:
    result = moecc(
        "run", compiled[0], "--tokens", tokens, "--check", "--json", "--seed", random.randrange(1 << 30)
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["passed"] is True
    assert figures["backend"] in ("x86", "cuda", "hip")
    assert figures["tokens"] == tokens
    assert figures["devices"] == 4
    assert figures["function"] == ("moe_decode" if tokens <= 32 else "moe_prefill")
    assert 0 < figures["relative_error"] <= figures["tolerance"]


@pytest.mark.slow
def test_shared_experts_of_another_width_run_apart(tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path, devices=1)
    shared = "  shared_experts: {count: 2, intermediate_size: 48}\n  dtype"
    yaml.write_text(yaml.read_text().replace("  dtype", shared).replace("sm_90", "sm_80"))
    assert moecc("compile", yaml, "-o", tmp_path / "out").returncode == 0
    result = moecc("run", tmp_path / "out", "--tokens", 9, "--check")
    assert result.returncode == 0, result.stderr
    assert "not fused: moe.shared_expert: its shape" in " ".join(
        json.loads((tmp_path / "out/report.json").read_text())["notes"]
    )


def test_bench_sets_measured_beside_predicted(compiled: Any) -> None:
    table = moecc("bench", compiled[0], "--seconds", "0.01")
    assert table.returncode == 0, table.stderr
    assert "predicted ms, h100-sxm" in table.stdout
    assert "note: h100-sxm is not here, x86 is: its times are predicted only" in table.stdout
    found = json.loads(moecc("bench", compiled[0], "--seconds", "0.01", "--json").stdout)
    assert found["schema"] == "moecc.bench/1"
    assert [row["kernels"] for row in found["rows"]] == ["moe_decode", "moe_prefill"]
    assert all(row["measured_us"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--layer", "9"], "--layer: layer 9 has no experts; hint: layers with experts: 0-1"),
        (["run", "--weights", "nowhere"], "nowhere: holds neither model.safetensors nor "),
        (["bench", "--seconds", "0"], "--seconds: 0 is out of range; hint: it must be in [0.01, 600]"),
    ],
)
def test_wrong_flags_of_an_artifact_are_named(compiled: Any, arguments: list[str], message: str) -> None:
    result = moecc(arguments[0], compiled[0], *arguments[1:])
    assert_one_line_error(result, 2)
    assert result.stderr.startswith(f"error: {message}")


def test_a_model_that_was_written_out_has_no_checkpoint(compiled: Any, tmp_path: Path) -> None:
    save_file({"model.layers.0.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    result = moecc("run", compiled[0], "--weights", tmp_path)
    assert_one_line_error(
        result,
        2,
        "--weights: no names of weights are known for the family 'inline'; hint: compile the model from its config.json",
    )


def test_a_wrong_kernel_is_noticed(compiled: Any, tmp_path: Path) -> None:
    """The check can fail: an artifact whose activation is another, its manifest made to match."""
    import hashlib
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(compiled[0], folder)
    kernels = folder / "kernels/moe_decode.py"
    text = kernels.read_text().replace('"ACTIVATION": "silu"', '"ACTIVATION": "gelu"')
    kernels.write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["kernels/moe_decode.py"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line_error(
        moecc("run", folder, "--tokens", 4, "--check"), 1, "the kernels disagree with the reference"
    )


def test_opt_continues_from_any_dump(compiled: Any) -> None:
    result = moecc("opt", compiled[0] / "ir/02-place.moe", "-p", "overlap,fuse,lower")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (compiled[0] / "ir/05-lower.moe").read_text()


def test_what_does_not_fit_fails_and_leaves_the_old_artifact(compiled: Any, tmp_path: Path) -> None:
    result = moecc("compile", "--preset", "deepseek-v3", "--devices-per-node", 1, "-o", compiled[0])
    assert_one_line_error(
        result, 1, "one device needs", "weights 1342.1", "has 80.0 GB; hint: use more devices"
    )
    load_artifact(compiled[0])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["compile"], ["0 models given, not one", "hint"]),
        (["compile", "nowhere.yaml"], ["nowhere.yaml", "hint"]),
        (["compile", "model.yaml", "--preset", "olmoe-1b-7b"], ["2 models given, not one"]),
        (["compile", "--preset", "olmo"], ["--preset", "unknown preset 'olmo'", "hint"]),
        (
            ["compile", "--preset", "olmoe-1b-7b", "--device", "h100"],
            ["--device", "unknown device 'h100'", "h100-sxm"],
        ),
        (["compile", "--preset", "olmoe-1b-7b", "--nodes", "0"], ["--nodes: 0 is not positive", "hint"]),
        (
            ["compile", "--preset", "olmoe-1b-7b", "--target", "sm_91"],
            ["--target", "unknown target 'sm_91'", "hint"],
        ),
        (["compile", "--hf-config", "."], ["config.json"]),
        (["compile", "model.yaml", "-o", "."], ["hint: choose another -o"]),
        (["opt", "nowhere.moe"], ["nowhere.moe: cannot be read", "hint"]),
        (["opt", "model.yaml"], ["model.yaml:11:23: unexpected character '-'", "hint"]),
        (["opt", "binary.npz"], ["binary.npz: byte", "is not UTF-8", "hint"]),
        (
            ["compile", "model.yaml", "--nodes", "2"],
            ["--nodes: cannot stand beside a model.yaml; hint: change cluster"],
        ),
        (["compile", "model.yaml", "--target", "x87"], ["--target", "unknown target 'x87'", "hint"]),
        (["run", "nowhere", "--seed", "-1"], ["nowhere: is not a moecc artifact", "hint"]),
        (["run", "nowhere"], ["nowhere: is not a moecc artifact", "hint"]),
        (["trace", "stats", "model.yaml"], ["model.yaml", "hint"]),
        (["trace", "stats", "binary.npz"], ["binary.npz", "hint"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    write_yaml(tmp_path)
    np.savez(tmp_path / "binary.npz", other=np.arange(3))
    assert_one_line_error(moecc(*arguments, cwd=tmp_path), 2, *parts)
    assert not (tmp_path / "out").exists()


def test_a_config_json_needs_no_yaml(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "norm_topk_prob": True,
        "vocab_size": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--hf-config", tmp_path / "config.json", "--device", "a100-sxm", "--devices-per-node", 1]
    result = moecc("compile", *arguments, "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {row["target"] for row in report["kernels"]} == {"sm_80"}
    assert report["placement"] is None
    assert (tmp_path / "out/kernels/sm_80").is_dir()


@pytest.mark.slow
def test_a_killed_compile_leaves_the_old_artifact_or_none(tmp_path: Path) -> None:
    """Killed at random moments, the last one surely while it writes; two at once do not mix."""
    yaml, out = write_yaml(tmp_path, devices=1), tmp_path / "out"
    command = [sys.executable, "-m", "moecc", "compile", str(yaml), "-o", str(out)]
    whole = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - whole
    before = load_artifact(out).manifest
    intact = 0
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.1, 1.1) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert load_artifact(out).manifest["files"].keys() == before["files"].keys()
            intact += 1
    assert intact, "the artifact is absent for an instant at most"
    together = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in together] == [0, 0]
    assert load_artifact(out).manifest["files"].keys() == before["files"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml", "out"]


def test_doctor_and_help() -> None:
    facts = json.loads(moecc("doctor", "--json").stdout)
    assert facts["compiles for"] == ["sm_80", "sm_90", "sm_100", "gfx942", "x86"]
    assert facts["x86 level"] in ("avx2", "avx512", "avx512bf16", "amx", "none")
    assert "compile" in moecc("--help").stdout
    assert len(preset_names()) >= 8
