"""What a compile says at the end, recomputed by hand, and its memory model against published figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moecc.build import BuiltKernels
from moecc.frontend.hf_config import load_preset
from moecc.frontend.spec import (
    ClusterSpec,
    CompileSpec,
    PlacementSpec,
    ServingSpec,
    TokensPerDevice,
    WorkloadSpec,
)
from moecc.frontend.to_ir import import_model
from moecc.frontend.workloads import workloads
from moecc.hardware import Cluster, load_device
from moecc.ir.core import Module
from moecc.passes.manager import Context, run_passes
from moecc.passes.pipeline import PIPELINE
from moecc.report import device_memory_use, report
from moecc.timeline import schedules, timeline

CONTEXT = 1000


def _compiled(preset: str, devices: int, *, layers: int | None = None) -> Module:
    model = load_preset(preset)
    if layers is not None:
        dense = tuple(layer for layer in model.dense_layers if layer < layers)
        moe = tuple(layer for layer in model.moe_layers if layer < layers)
        model = replace(model, layers=layers, moe_layers=moe, dense_layers=dense)
    spec = CompileSpec(
        model=model,
        cluster=ClusterSpec(device="h100-sxm", nodes=1, devices_per_node=devices),
        workloads=(WorkloadSpec(name="assumed", routing="uniform"),),
        serving=ServingSpec(context_length=CONTEXT, tokens_per_device=TokensPerDevice(decode=1, prefill=64)),
        placement=PlacementSpec(time_limit_s=1.0, max_imbalance=1.5),
        source="test",
    )
    module = import_model(spec)
    run_passes(module, PIPELINE, Context(workloads=workloads(spec)))
    return module


@pytest.mark.parametrize(
    ("preset", "kv_bytes_per_token", "billions"),
    [
        # 70,272 bytes: table 1 of "Insights into DeepSeek-V3", arXiv:2505.09343; 671 B: the model card.
        ("deepseek-v3", 70_272, 671.0),
        # 4 KV heads x 128 x 2 x 48 layers x 2 bytes; 30.5 B: the model card.
        ("qwen3-30b-a3b", 98_304, 30.5),
        # 8 KV heads x 128 x 2 x 32 layers x 2 bytes; 46.7 B: the model card.
        ("mixtral-8x7b", 131_072, 46.7),
    ],
)
def test_memory_of_published_models(preset: str, kv_bytes_per_token: int, billions: float) -> None:
    memory = device_memory_use(_compiled(preset, 1), load_device("h100-sxm"))
    assert memory.kv_cache_bytes == kv_bytes_per_token * CONTEXT
    assert memory.weights_bytes == pytest.approx(2 * billions * 1e9, rel=0.01)
    assert memory.capacity_bytes == load_device("h100-sxm").memory_bytes
    assert memory.fits == (billions < 40)


def test_sliding_windows_bound_the_cache() -> None:
    """gpt-oss-20b: 24 layers, 8 KV heads x 64; every other layer sees 128 tokens."""
    memory = device_memory_use(_compiled("gpt-oss-20b", 1), load_device("h100-sxm"))
    assert memory.kv_cache_bytes == 2 * 8 * 64 * 2 * 12 * (CONTEXT + 128)


@pytest.fixture(scope="module")
def placed() -> Module:
    """Two dense and two MoE layers of DeepSeek-V3 on four devices."""
    return _compiled("deepseek-v3", 4, layers=5)


def _report(module: Module) -> dict[str, Any]:
    cluster = Cluster(device=load_device("h100-sxm"), nodes=1, devices_per_node=4)
    memory = device_memory_use(module, cluster.device)
    return report(module, cluster, memory, BuiltKernels(), seconds=lambda: 1.5)


def test_experts_are_shared_out(placed: Module) -> None:
    """Of the weights only the routed experts are divided by four."""
    whole = device_memory_use(_compiled("deepseek-v3", 1, layers=5), load_device("h100-sxm"))
    mine = device_memory_use(placed, load_device("h100-sxm"))
    experts = 2 * 256 * 3 * 7168 * 2048 * 2
    assert whole.weights_bytes - mine.weights_bytes == experts * 3 // 4


def test_a_step_is_the_sum_of_its_layers(placed: Module) -> None:
    for step in _report(placed)["steps"]:
        for key in ("serial_us", "makespan_us", "bound_us"):
            assert step[key] == pytest.approx(sum(f["layers"] * f[key] for f in step["functions"]))
        assert step["bound_us"] <= step["makespan_us"] * (1 + 1e-9) <= step["serial_us"] * (1 + 1e-9)


def test_what_rests_on_an_assumption_says_so(placed: Module) -> None:
    notes = _report(placed)["notes"]
    assert any("assumed routing (uniform), not measured" in note for note in notes)
    assert any("GPU times are predictions" in note for note in notes)
    assert any("moe_decode: not fused: moe.shared_expert" in note for note in notes)


def test_layers_are_judged_on_held_out_tokens(placed: Module) -> None:
    placement = _report(placed)["placement"]
    assert [layer["layer"] for layer in placement["layers"]] == [3, 4]
    mean = sum(layer["after"]["imbalance"] for layer in placement["layers"]) / 2
    assert placement["after"]["imbalance"] == pytest.approx(mean)
    assert placement["held_out_tokens"] == {"assumed": 2048}


def test_the_timeline_shows_every_task_once(placed: Module) -> None:
    shown = [event for event in timeline(placed)["traceEvents"] if event["ph"] == "X"]
    tasks = [task for f in schedules(placed)["functions"] for task in f["tasks"]]
    assert [event["name"] for event in shown] == [task["name"] for task in tasks]
    assert [event["ts"] for event in shown] == [task["start_us"] for task in tasks]
    streams = {
        event["args"]["name"] for event in timeline(placed)["traceEvents"] if event["name"] == "thread_name"
    }
    assert streams == {"compute", "comm"}
