"""The predicate, the defaults and the grid bound, without compiling anything."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moecc.autotune.defaults import default_configs
from moecc.autotune.training_defaults import training_configs
from moecc.codegen.config import (
    BackwardConfigs,
    CombineConfig,
    GemmConfig,
    KernelConfigs,
    LayerShape,
    RouterConfig,
    SumConfig,
    why_invalid,
)
from moecc.codegen.frozen import tiles_max
from moecc.codegen.targets import COMPILED_TARGETS, TARGETS, find_target
from moecc.errors import InputError
from moecc.ir.semantics import Router

SHAPE = LayerShape(tokens=256, hidden=2048, intermediate=768, experts=128, top_k=8)
GEMM = GemmConfig(block_m=64, block_n=64, block_k=64)
CONFIGS = KernelConfigs(router=RouterConfig(), gate_up=GEMM, down=GEMM, combine=CombineConfig())


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 3),
    experts=st.integers(1, 4),
    top_k=st.integers(1, 4),
    block_m=st.sampled_from([1, 2, 4]),
)
def test_tiles_max_is_the_exact_worst_case(tokens, experts, top_k, block_m):
    choices = list(itertools.combinations(range(experts), min(top_k, experts)))
    worst = 0
    for routing in itertools.product(choices, repeat=tokens):
        counts = [sum(expert in chosen for chosen in routing) for expert in range(experts)]
        worst = max(worst, sum(-(-count // block_m) for count in counts))
    assert tiles_max(tokens, top_k, experts, block_m) == worst


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 1 << 16),
    hidden=st.integers(1, 1024).map(lambda n: 16 * n),
    intermediate=st.integers(1, 1024).map(lambda n: 16 * n),
    experts=st.integers(1, 512),
    top_k=st.integers(1, 16),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    target=st.sampled_from(list(TARGETS)),
)
def test_defaults_are_always_valid(tokens, hidden, intermediate, experts, top_k, dtype, target):
    assume(top_k <= experts)
    shape = LayerShape(
        tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=dtype
    )
    assert why_invalid(default_configs(shape, target), shape, find_target(target)) is None
    training = training_configs(shape, target)
    assert why_invalid(training, shape, find_target(target)) is None
    assert replace(training, backward=None) == default_configs(shape, target)


def test_backward_configs_are_judged_too():
    backward = BackwardConfigs(grad_pre=GEMM, grad_x=GEMM, grad_gate_up=GEMM, grad_down=GEMM)
    cases = {
        "gate_up block_m 64 is not grad_x block_m 32": replace(backward, grad_x=replace(GEMM, block_m=32)),
        "grad_down block_k 24 is not a power of two": replace(backward, grad_down=replace(GEMM, block_k=24)),
        "grad_bias block_r 0 is smaller than 1": replace(backward, grad_bias=SumConfig(block_r=0)),
        "grad_gate_up needs 589824 bytes of shared memory of 232448": replace(
            backward, grad_gate_up=replace(GEMM, block_n=512, block_k=256, num_stages=2)
        ),
    }
    for problem, configs in cases.items():
        found = why_invalid(replace(CONFIGS, backward=configs), SHAPE, find_target("sm_90"))
        assert found == problem


@pytest.mark.parametrize(("tokens", "block_m"), [(1, 16), (256, 16), (512, 32), (1024, 64), (4096, 128)])
def test_default_block_m_holds_the_expected_rows(tokens, block_m):
    assert default_configs(replace(SHAPE, tokens=tokens), "sm_90").gate_up.block_m == block_m


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gate_up": replace(GEMM, block_m=32)}, "gate_up block_m 32 is not down block_m 64"),
        ({"down": replace(GEMM, block_n=96)}, "down block_n 96 is not a power of two"),
        ({"down": replace(GEMM, block_k=8)}, "down block_k 8 is smaller than 16, the least a dot takes"),
        ({"down": replace(GEMM, num_warps=64)}, "down num_warps 64 is larger than 32"),
        ({"down": replace(GEMM, num_stages=0)}, "down num_stages 0 is smaller than 1"),
        (
            {"gate_up": replace(GEMM, block_n=256, num_stages=4)},
            "gate_up needs 294912 bytes of shared memory of 232448",
        ),
        (
            {"router": RouterConfig(block_h=512)},
            "router needs 294912 bytes of shared memory of 232448",
        ),
        (
            {"router": RouterConfig(split_h=32)},
            "router split_h 32 leaves a program without a block of hidden 2048",
        ),
    ],
)
def test_why_invalid_names_the_reason(changes, problem):
    assert why_invalid(CONFIGS, SHAPE, TARGETS["sm_90"]) is None
    assert why_invalid(replace(CONFIGS, **changes), SHAPE, TARGETS["sm_90"]) == problem


def test_lds_of_cdna3_is_the_tightest():
    large = replace(CONFIGS, gate_up=replace(GEMM, block_n=128, num_stages=4))
    assert why_invalid(large, SHAPE, TARGETS["sm_80"]) is None
    assert (
        why_invalid(large, SHAPE, TARGETS["gfx942"]) == "gate_up needs 122880 bytes of shared memory of 65536"
    )


def test_a_cpu_takes_tiles_of_any_power_of_two_that_its_caches_hold():
    one_row = replace(GEMM, block_m=1)
    assert why_invalid(replace(CONFIGS, gate_up=one_row, down=one_row), SHAPE, TARGETS["x86"]) is None
    odd = replace(CONFIGS, down=replace(GEMM, block_k=768))
    assert why_invalid(odd, SHAPE, TARGETS["x86"]) == "down block_k 768 is not a power of two"
    large = replace(GEMM, block_m=64, block_n=4096, block_k=2048)
    problem = why_invalid(replace(CONFIGS, gate_up=large, down=large), SHAPE, TARGETS["x86"])
    assert problem == "gate_up needs 35913728 bytes of cache of 8388608"


@pytest.mark.parametrize(("tokens", "block_m"), [(1, 8), (128, 16), (256, 32), (512, 64), (4096, 64)])
def test_row_tiles_of_a_cpu_hold_twice_the_expected_rows(tokens, block_m):
    configs = default_configs(replace(SHAPE, tokens=tokens), "x86")
    assert configs.gate_up.block_m == configs.down.block_m == block_m
    assert (configs.gate_up.block_k, configs.down.block_k) == (2048, 256)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"top_k": 129}, "top_k 129 is larger than experts 128"),
        ({"router": Router(groups=3)}, "128 experts cannot be limited to 1 of 3 groups"),
        ({"router": Router(groups=8, top_groups=9)}, r"cannot be limited to 9 of 8 groups"),
        ({"router": Router(groups=32, top_groups=1)}, "top_k 8 is larger than the 4 experts"),
        ({"hidden": 0}, "hidden 0 is not positive"),
        ({"dtype": "float8"}, "dtype 'float8' is none of bfloat16, float16, float32"),
    ],
)
def test_impossible_shapes_are_refused(changes, problem):
    with pytest.raises(InputError, match=problem):
        replace(SHAPE, **changes)


def test_targets_that_do_not_exist():
    with pytest.raises(
        InputError, match="unknown target 'sm_75'; hint: known targets: sm_80, sm_90, sm_100, gfx942, x86"
    ):
        default_configs(SHAPE, "sm_75")
    assert COMPILED_TARGETS == ("sm_80", "sm_90", "sm_100", "gfx942", "x86")


def test_the_stage_stays_light():
    """Whoever plans or emits pays neither for torch nor for triton."""
    modules = ("aot", "config", "emit", "frozen", "resources", "switches", "targets")
    code = "import sys; " + "; ".join(f"import moecc.codegen.{module}" for module in modules)
    code += "; import moecc.autotune.defaults; print({'torch', 'triton', 'ortools'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
