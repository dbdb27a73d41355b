"""The kernels of the backward pass compiled for GPUs that are not here, at their default configs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moecc.autotune.training_defaults import training_configs
from moecc.codegen.aot import Job, compile_batch
from moecc.codegen.config import DTYPE_BYTES, GemmConfig, LayerShape, gemm_shared_bytes
from moecc.codegen.targets import COMPILED_TARGETS, TARGETS
from moecc.ir.semantics import Activation

MODELS = {
    "qwen3-30b": LayerShape(tokens=1, hidden=2048, intermediate=768, experts=128, top_k=8),
    "olmoe": LayerShape(tokens=1, hidden=2048, intermediate=1024, experts=64, top_k=8),
    "mixtral": LayerShape(tokens=1, hidden=4096, intermediate=14336, experts=8, top_k=2),
    "gpt-oss-20b": LayerShape(
        tokens=1,
        hidden=2880,
        intermediate=2880,
        experts=32,
        top_k=4,
        activation=Activation(kind="clamped_swiglu"),
        has_expert_bias=True,
        transposed=True,
        interleaved=True,
    ),
}
GPU_TARGETS = tuple(name for name in COMPILED_TARGETS if name != "x86")
FEW, MANY = 64, 4096
# Every model and every target once; the rest of the product is marked slow.
QUICK = {
    ("qwen3-30b", "sm_90", MANY),
    ("olmoe", "sm_80", FEW),
    ("mixtral", "gfx942", MANY),
    ("gpt-oss-20b", "sm_100", FEW),
}
ALL = list(itertools.product(MODELS, GPU_TARGETS, (FEW, MANY)))
GEMMS = ("grad_pre", "grad_x", "grad_gate_up", "grad_down")


@pytest.mark.parametrize(
    ("model", "target", "tokens"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_defaults_do_not_spill_and_fit(model, target, tokens):
    shape = replace(MODELS[model], tokens=tokens)
    configs = training_configs(shape, target)
    names = ("gate_up", *GEMMS)
    if shape.has_expert_bias:
        names += ("grad_gate_up_bias", "grad_down_bias")
    [kernels] = compile_batch([Job(shape=shape, configs=configs, target=target, kernels=names)])
    for kernel in kernels:
        resources, limits = kernel.resources, TARGETS[target]
        assert resources.spill_bytes == 0, kernel.name
        assert resources.shared_bytes <= limits.shared_bytes
        if kernel.name in GEMMS:
            config = configs.by_kernel[kernel.name]
            assert isinstance(config, GemmConfig)
            assert resources.matrix_instruction
            predicted = gemm_shared_bytes(config, weights=1, dtype=shape.dtype, target=limits)
            # The gradient of weights passes through shared memory on its way out.
            stored = config.block_m * config.block_n * DTYPE_BYTES[shape.dtype]
            assert resources.shared_bytes <= max(predicted, stored), kernel.name
