"""Kernels compiled for GPUs that are not here: what they occupy, and that the predicate knows it."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moecc.autotune.defaults import default_configs
from moecc.codegen.aot import Job, compile_batch, compile_kernels
from moecc.codegen.config import GemmConfig, LayerShape, gemm_shared_bytes, tile_shared_bytes
from moecc.codegen.resources import count_loop_instructions
from moecc.codegen.targets import COMPILED_TARGETS, TARGETS
from moecc.errors import InputError
from moecc.ir.semantics import Activation, Router

MODELS = {
    "qwen3-30b": LayerShape(
        tokens=1, hidden=2048, intermediate=768, experts=128, top_k=8, router=Router(normalize=True)
    ),
    "deepseek-v3": LayerShape(
        tokens=1,
        hidden=7168,
        intermediate=2048,
        experts=256,
        top_k=8,
        shared=1,
        router=Router(
            score="sigmoid",
            selection_bias=True,
            groups=8,
            top_groups=4,
            group_score="top2_sum",
            normalize=True,
            norm_eps=1e-20,
            scale=2.5,
        ),
    ),
    "gpt-oss-120b": LayerShape(
        tokens=1,
        hidden=2880,
        intermediate=2880,
        experts=128,
        top_k=4,
        router=Router(select_first=True),
        activation=Activation(kind="clamped_swiglu"),
        has_router_bias=True,
        has_expert_bias=True,
    ),
    "olmoe": LayerShape(tokens=1, hidden=2048, intermediate=1024, experts=64, top_k=8),
    "mixtral": LayerShape(
        tokens=1, hidden=4096, intermediate=14336, experts=8, top_k=2, router=Router(normalize=True)
    ),
}
GPU_TARGETS = tuple(name for name in COMPILED_TARGETS if name != "x86")
DECODE, PREFILL = 64, 4096
# Every model, every target and both phases once; the rest of the product is marked slow.
QUICK = {
    ("qwen3-30b", "sm_90", DECODE),
    ("qwen3-30b", "gfx942", PREFILL),
    ("deepseek-v3", "sm_100", DECODE),
    ("deepseek-v3", "sm_90", PREFILL),
    ("gpt-oss-120b", "sm_80", PREFILL),
    ("olmoe", "gfx942", DECODE),
    ("mixtral", "sm_100", PREFILL),
    ("mixtral", "sm_80", DECODE),
}
ALL = list(itertools.product(MODELS, GPU_TARGETS, (DECODE, PREFILL)))


def compile_defaults(model: str, target: str, tokens: int):
    shape = replace(MODELS[model], tokens=tokens)
    configs = default_configs(shape, target)
    return shape, configs, compile_kernels(shape, configs, target)


@pytest.mark.parametrize(
    ("model", "target", "tokens"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_defaults_do_not_spill_and_fit(model, target, tokens):
    shape, configs, kernels = compile_defaults(model, target, tokens)
    names = ["router", "gate_up", "down", "combine"]
    assert [kernel.name for kernel in kernels] == (
        names if tokens == DECODE else [*names[:1], "scatter", *names[1:]]
    )
    for kernel in kernels:
        resources, limits = kernel.resources, TARGETS[target]
        assert resources.spill_bytes == 0, kernel.name
        assert 0 < resources.registers <= (512 if target == "gfx942" else 255)
        assert resources.shared_bytes <= limits.shared_bytes
        assert kernel.binary[:4] == b"\x7fELF"
        assert str(Path(__file__).parents[2]) not in kernel.assembly, "a path of this machine"
        if kernel.name in ("gate_up", "down"):
            config = getattr(configs, kernel.name)
            weights = 2 if kernel.name == "gate_up" else 1
            assert resources.shared_bytes == gemm_shared_bytes(
                config, weights=weights, dtype=shape.dtype, target=limits
            )
            assert resources.matrix_instruction == expected_instruction(target, config)
    router = configs.router
    assert kernels[0].resources.shared_bytes <= max(
        tile_shared_bytes(
            router.block_t,
            shape.router_columns,
            router.block_h,
            stages=router.num_stages,
            dtype=shape.dtype,
            target=limits,
        ),
        16384,  # the sort's scratch
    )


def expected_instruction(target: str, config: GemmConfig) -> str:
    if target == "gfx942":
        return "mfma"
    large = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[target]
    return large if config.block_m >= 64 else "mma"


@pytest.mark.slow
@pytest.mark.parametrize("target", GPU_TARGETS)
def test_shared_memory_is_predicted_exactly(target):
    """Off the defaults too: tiles, stages and types that a search would try."""
    shape = replace(MODELS["qwen3-30b"], tokens=64)
    tiles = [(16, 32, 128, 3, 4), (32, 64, 64, 4, 4), (64, 64, 32, 2, 4), (128, 32, 64, 3, 8)]
    jobs = []
    for (block_m, block_n, block_k, stages, warps), dtype in zip(
        tiles, ["bfloat16", "float16", "bfloat16", "bfloat16"], strict=True
    ):
        gemm = GemmConfig(
            block_m=block_m, block_n=block_n, block_k=block_k, num_stages=stages, num_warps=warps, group_m=4
        )
        configs = replace(default_configs(shape, target), gate_up=gemm, down=gemm)
        jobs.append(
            Job(
                shape=replace(shape, dtype=dtype), configs=configs, target=target, kernels=("gate_up", "down")
            )
        )
    for job, kernels in zip(jobs, compile_batch(jobs), strict=True):
        for kernel, weights in zip(kernels, (2, 1), strict=True):
            predicted = gemm_shared_bytes(
                job.configs.gate_up, weights=weights, dtype=job.shape.dtype, target=TARGETS[target]
            )
            assert kernel.resources.shared_bytes == predicted, (kernel.name, job.configs.gate_up)


@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_x86_kernels_are_libraries_that_multiply_tiles(tokens):
    """Whatever CPU compiles them; the same bytes every time."""
    shape = replace(MODELS["qwen3-30b"], tokens=tokens)
    job = Job(shape=shape, configs=default_configs(shape, "x86"), target="x86")
    first, again = compile_batch([job, job])
    assert [(kernel.assembly, kernel.binary) for kernel in first] == [
        (kernel.assembly, kernel.binary) for kernel in again
    ]
    for kernel in first:
        assert kernel.binary[:4] == b"\x7fELF"
        assert (kernel.assembly_suffix, kernel.binary_suffix) == ("s", "so")
        assert str(Path(__file__).parents[2]) not in kernel.assembly, "a path of this machine"
        resources = kernel.resources
        assert (resources.registers, resources.shared_bytes, resources.spill_bytes) == (None, None, None)
        if kernel.name in ("gate_up", "down"):
            assert resources.matrix_instruction == "amx"
            assert resources.loop_instructions > 0


def test_float32_and_given_routing_compile():
    jobs = []
    for target, tokens in (("sm_90", 4096), ("gfx942", 64)):
        shape = replace(MODELS["olmoe"], tokens=tokens, dtype="float32")
        jobs.append(
            Job(
                shape=shape,
                configs=default_configs(shape, target),
                target=target,
                kernels=("gate_up", "down"),
            )
        )
    routed = replace(MODELS["deepseek-v3"], tokens=2048)
    jobs.append(
        Job(
            shape=routed,
            configs=default_configs(routed, "gfx942"),
            target="gfx942",
            kernels=("plan", "scatter"),
        )
    )
    for job, kernels in zip(jobs, compile_batch(jobs), strict=True):
        for kernel in kernels:
            assert kernel.resources.spill_bytes == 0, kernel.name
            if job.shape.dtype == "float32":
                assert kernel.resources.shared_bytes == gemm_shared_bytes(
                    getattr(job.configs, kernel.name),
                    weights=2 if kernel.name == "gate_up" else 1,
                    dtype="float32",
                    target=TARGETS[job.target],
                )


def test_the_last_program_sees_what_the_others_stored():
    """The order of barrier, fence, counter and invalidation that the last-arrival pattern rests on."""
    shape = replace(MODELS["olmoe"], tokens=16)
    jobs = [
        Job(shape=shape, configs=default_configs(shape, target), target=target, kernels=("down",))
        for target in ("sm_90", "gfx942")
    ]
    (cuda,), (amd,) = compile_batch(jobs)
    assert re.search(
        r"bar\.sync[^;]*;(?:(?!st\.global).)*?atom\.global\.gpu\.acq_rel", cuda.assembly, re.DOTALL
    )
    amd_order = r"s_waitcnt vmcnt\(0\)(?:(?!global_store).)*?s_barrier.*?buffer_wbl2 sc1.*?global_atomic_add.*?buffer_inv sc1"
    assert re.search(amd_order, amd.assembly, re.DOTALL)


def test_what_cannot_be_compiled():
    shape = replace(MODELS["mixtral"], tokens=4096)
    with pytest.raises(
        InputError, match=r"kernel configs for gfx942: gate_up needs \d+ bytes of shared memory"
    ):
        compile_kernels(shape, default_configs(shape, "sm_90"), "gfx942")
    with pytest.raises(InputError, match="the interpreter compiles nothing"):
        compile_kernels(shape, default_configs(shape, "interpret"), "interpret")


def test_the_main_loop_is_the_one_that_multiplies():
    """A loop that waits inside it does not end it; an outer loop and one without multiplications do not count."""
    listing = """
.L_x_1:
        /*0000*/ HGMMA.64x64x16.F32.BF16 R24, gdesc ;
.L_x_2:
        /*0010*/ SYNCS.PHASECHK ;
        /*0020*/ @!P0 BRA `(.L_x_2) ;
        /*0030*/ IADD3 R1, R1, 0x1 ;
        /*0040*/ @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0050*/ IADD3 R1, R1, 0x1 ;
        /*0060*/ FFMA R1, R1, R2, R3 ;
        /*0070*/ @P1 BRA `(.L_x_3) ;
        /*0080*/ BRA `(.L_x_4) ;
.L_x_4:
"""
    assert count_loop_instructions(listing) == 5
    x86 = """
.LBB0_1:
	tileloadd	(%rax,%rcx), %tmm1
	tdpbf16ps	%tmm1, %tmm2, %tmm0
	jne	.LBB0_1
	vzeroupper
	retq
"""
    assert count_loop_instructions(x86) == 3
    assert count_loop_instructions("        /*0000*/ HMMA R1, R2 ;\n        /*0010*/ EXIT ;\n") == 0


def test_a_clamp_keeps_nan_on_the_gpu():
    """PTX's plain min and max drop NaN; the interpreter's keep it. gpt-oss must not turn NaN into its limit."""
    shape = replace(MODELS["gpt-oss-120b"], tokens=DECODE)
    job = Job(shape=shape, configs=default_configs(shape, "sm_90"), target="sm_90", kernels=("gate_up",))
    [[kernel]] = compile_batch([job])
    assert "min.NaN.f32" in kernel.assembly
    assert "max.NaN.f32" in kernel.assembly
    assert not re.search(r"\b(min|max)\.f32", kernel.assembly)
