"""moecc bench: what stands beside the times is counted right; how long anything took is nobody's test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecc.artifact import Artifact
from moecc.codegen.config import LayerShape
from moecc.driver import compile_model
from moecc.errors import InputError, MoeccError
from moecc.frontend.model_yaml import load_model_yaml
from moecc.hardware import Cluster, ExpertLayer, latency_us, load_device
from moecc.runtime import bench
from moecc.runtime.load import best_device

MODEL = """\
moecc: 1
model:
  hidden_size: 64
  moe_layers: 2
  experts: 8
  top_k: 2
  intermediate_size: 32
  router: {score: softmax, normalize: true}
  shared_experts: {count: 1, intermediate_size: 48}
cluster: {device: DEVICE, devices_per_node: DEVICES}
serving: {tokens_per_device: {decode: 8, prefill: 64}}
placement: {time_limit_s: 1}
targets: [x86]
"""


def compiled(folder: Path, device: str, devices: int) -> Artifact:
    text = MODEL.replace("DEVICES", str(devices)).replace("DEVICE", device)
    (folder / "model.yaml").write_text(text)
    return compile_model(load_model_yaml(folder / "model.yaml"), folder / "out").artifact


@pytest.fixture(autouse=True)
def native() -> None:
    if best_device() != ("cpu", "x86"):
        pytest.skip("times are those of a CPU")


def test_work_counts_rows_weights_and_what_comes_and_goes() -> None:
    """Two experts, both hit for sure by 1,000 tokens; a shared one sees every token."""
    shape = LayerShape(tokens=1000, hidden=64, intermediate=32, experts=2, top_k=1, shared=1)
    work = bench.work_of(shape)
    assert work.rows == 2000
    assert work.experts == pytest.approx(3)
    assert work.flops == 2 * 2000 * 3 * 64 * 32
    assert work.bytes == pytest.approx(2 * (3 * 3 * 64 * 32 + 2 * 1000 * 64))


def test_few_tokens_hit_few_experts() -> None:
    shape = LayerShape(tokens=1, hidden=64, intermediate=32, experts=128, top_k=1, dtype="float32")
    assert bench.work_of(shape).experts == pytest.approx(1)
    assert bench.work_of(replace(shape, tokens=3)).experts == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_kernel_set_is_measured_beside_its_prediction(tmp_path: Path, devices: int) -> None:
    artifact = compiled(tmp_path, "h100-sxm", devices)
    found = json.loads(json.dumps(bench.bench_artifact(artifact, seconds=0.01).to_json()))
    assert [row["kernels"] for row in found["rows"]] == [
        "moe_decode",
        "moe_decode_shared",
        "moe_prefill",
        "moe_prefill_shared",
    ]
    assert found["machine"] == "x86"
    assert found["read_gb_s"] > 0
    for row in found["rows"]:
        assert 0 < row["lower_us"] <= row["measured_us"] <= row["upper_us"]
        assert row["rounds"] >= 3
        assert row["bandwidth_share"] > 0
        assert set(row["predicted_us"]) == {"h100-sxm", "x86"}
    assert found["notes"][0] == "h100-sxm is not here, x86 is: its times are predicted only"
    assert found["notes"][2].startswith("predictions for x86 are those of another machine: ")


def test_a_prediction_is_the_latency_model_of_that_work(tmp_path: Path) -> None:
    artifact = compiled(tmp_path, "x86", 1)
    found = bench.bench_artifact(artifact, seconds=0.01)
    row = next(row for row in found.rows if row.kernels == "moe_prefill")
    layer = ExpertLayer(
        tokens=64, rows=128, experts_active=row.work.experts, hidden=64, intermediate=32, dtype="bfloat16"
    )
    assert row.predicted_us == {"x86": latency_us(layer, Cluster(device=load_device("x86")))}
    assert not any("is not here" in note for note in found.notes)


def test_what_does_not_fit_is_predicted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compiled(tmp_path, "h100-sxm", 1)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 100_000)
    found = bench.bench_artifact(artifact, seconds=0.01)
    row = found.rows[0]
    assert row.measured_us is None
    assert row.why == "the weights need 0.0 GB, 0.0 GB are free"
    assert row.predicted_us["h100-sxm"] > 0


@pytest.mark.slow
def test_a_device_may_hold_fewer_experts_than_a_token_takes(tmp_path: Path) -> None:
    artifact = compiled(tmp_path, "h100-sxm", 8)
    assert all(row.measured_us for row in bench.bench_artifact(artifact, seconds=0.01).rows)


@pytest.mark.parametrize(("tokens", "received"), [(8, 14), (5, 5), (1, 1)])
def test_a_device_gets_the_rows_of_its_own_tokens(tokens: int, received: int) -> None:
    import torch

    shape = LayerShape(
        tokens=tokens, hidden=64, intermediate=32, experts=8, top_k=2, slots=4, received=received
    )
    ids = bench._uniform_ids(shape, torch.Generator().manual_seed(1))
    assert ids.shape == (received, 2)
    assert int((ids >= 0).sum()) == tokens * 2
    for row in ids.tolist():
        kept = [expert for expert in row if expert >= 0]
        assert len(set(kept)) == len(kept)
        assert all(expert < 4 for expert in kept)


@pytest.mark.parametrize("seconds", [0.0, 601.0, float("nan")])
def test_a_time_out_of_range_is_refused(seconds: float) -> None:
    artifact: Any = None
    with pytest.raises(InputError) as error:
        bench.bench_artifact(artifact, seconds=seconds)
    assert str(error.value) == f"--seconds: {seconds:g} is out of range; hint: it must be in [0.01, 600]"


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact: Any = None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        MoeccError, match="^times of Triton's interpreter say nothing; hint: unset TRITON_INTERPRET$"
    ):
        bench.bench_artifact(artifact, seconds=1)
