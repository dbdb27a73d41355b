"""The launches that `lower` writes down are those that the emitted launcher makes."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from moecc.autotune.defaults import default_configs
from moecc.codegen.frozen import kernel_sequence
from moecc.codegen.layers import KernelSet, kernel_set, kernel_sets
from moecc.codegen.switches import freeze_configs
from moecc.codegen.targets import TARGETS
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
from moecc.ir.core import Function, Module
from moecc.ir.ops import AllToAll, Attention, Launch
from moecc.passes.manager import Context, run_passes
from moecc.passes.pipeline import PIPELINE


@cache
def _lowered(preset: str, devices: int, decode: int) -> Module:
    spec = CompileSpec(
        model=load_preset(preset),
        cluster=ClusterSpec(device="h100-sxm", nodes=1, devices_per_node=devices),
        workloads=(WorkloadSpec(name="assumed", routing="uniform"),),
        serving=ServingSpec(tokens_per_device=TokensPerDevice(decode=decode, prefill=4096)),
        placement=PlacementSpec(time_limit_s=0.5),
        source="test",
    )
    module = import_model(spec)
    run_passes(module, PIPELINE, Context(workloads=workloads(spec)))
    return module


def _launched(function: Function, suffix: str) -> list[str]:
    """Kernels of one token chunk of a set, in order; every chunk launches the same."""
    counts = Counter(op.kernel for op in function.every(Launch) if op.suffix == suffix)
    chunks = 1 if suffix else function.attributes["schedule"]["split"]["chunks"]
    assert set(counts.values()) == {chunks}
    return list(counts)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("preset", "devices", "decode"),
    [
        ("olmoe-1b-7b", 1, 16),
        ("olmoe-1b-7b", 1, 256),
        ("qwen1.5-moe-a2.7b", 1, 16),
        ("qwen3-30b-a3b", 8, 8),
        ("deepseek-v3", 8, 128),
    ],
)
def test_launches_agree_with_the_launcher(preset: str, devices: int, decode: int, target: str) -> None:
    module = _lowered(preset, devices, decode)
    sets = kernel_sets(module)
    compared = 0
    for function in module.functions:
        for suffix in ("", "_shared"):
            kernels = kernel_set(sets, function, suffix)
            if kernels is not None:
                launched = _launched(function, suffix)
                if target == "x86" and "down_combine" in launched:
                    # The IR speaks of GPUs, where one launch less counts; a CPU combines apart.
                    launched[-1:] = ["down", "combine"]
                assert launched == _expected(kernels, target)
                compared += 1
    assert compared >= 2


def _expected(kernels: KernelSet, target: str) -> list[str]:
    config = freeze_configs(default_configs(kernels.shape, target))
    first, *rest = kernel_sequence(config, kernels.shape.expert_tokens)
    start = {"forward": [first], "distributed": ["router", "plan"], "experts": ["plan"]}[kernels.entry]
    fused = "combine" not in rest
    return start + ["down_combine" if name == "down" and fused else name for name in rest]


@pytest.mark.parametrize(("preset", "devices", "decode"), [("olmoe-1b-7b", 1, 16), ("deepseek-v3", 8, 128)])
def test_every_task_of_the_schedule_has_its_ops(preset: str, devices: int, decode: int) -> None:
    """What schedule.json orders can be found among the launches, and nothing is launched outside it."""
    for function in _lowered(preset, devices, decode).functions:
        scheduled = {task["name"] for task in function.attributes["schedule"]["tasks"]}
        carried = [set(op.tasks) for op in function.ops]
        assert set().union(*carried) == scheduled
        for op in function.ops:
            if isinstance(op, (Launch, AllToAll, Attention)):
                assert op.tasks, f"{function.name}: {op.mnemonic} belongs to no task"
