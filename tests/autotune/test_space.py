"""The spaces of configs: what the predicate says and why, and that no config that people tuned is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tuned_entries import TUNED, entries_of, tuned_files

from moecc.autotune.boards import Board, board_names, find_board
from moecc.autotune.defaults import default_configs
from moecc.autotune.fused_moe import PRECISIONS, FusedMoeConfig, FusedMoeShape, shared_bytes, why_invalid
from moecc.autotune.space import fused_moe_space, fused_moe_tiles, kernel_space
from moecc.codegen import config as kernels
from moecc.codegen.config import LayerShape
from moecc.codegen.targets import find_target
from moecc.errors import InputError

H100 = find_board("h100-sxm")
BF16 = PRECISIONS["bfloat16"]
CONFIG = FusedMoeConfig(
    block_size_m=64, block_size_n=128, block_size_k=64, group_size_m=8, num_warps=4, num_stages=3
)


@pytest.mark.skipif(not TUNED.is_dir(), reason="tuned configs absent: set MOECC_SHARED")
def test_no_tuned_config_is_refused() -> None:
    """Every config of vLLM's and SGLang's files whose board is known, those of the second GEMM alone too."""
    refused, judged, unknown = [], 0, set()
    for path, file in tuned_files():
        if file.name.backend:
            continue
        if file.name.device not in board_names():
            unknown.add(file.name.device)
            continue
        for entry in entries_of(file):
            judged += 1
            problem = why_invalid(entry.config, entry.shape.precision, entry.board)
            refused += [f"{path.name}, {entry.shape.tokens} tokens: {problem}"] if problem else []
    assert not refused
    assert judged >= 8500
    assert len(unknown) <= 7


@pytest.mark.parametrize(
    ("tile", "stages", "expected"),
    [
        ((16, 64, 128), 4, 61440),
        ((16, 128, 128), 5, 147456),
        ((32, 256, 128), 2, 73728),
        ((64, 128, 64), 3, 73728),
        ((64, 128, 128), 4, 196608),
        ((128, 256, 64), 4, 196608),
    ],
)
def test_shared_memory_is_that_of_compiled_kernels(
    tile: tuple[int, int, int], stages: int, expected: int
) -> None:
    """Bytes that the compiler reports for vLLM's kernel in bf16 on sm_90."""
    m, n, k = tile
    config = replace(CONFIG, block_size_m=m, block_size_n=n, block_size_k=k, num_stages=stages)
    assert shared_bytes(config, BF16, H100) == expected


@pytest.mark.parametrize(
    ("changes", "board", "dtype", "reason"),
    [
        ({"block_size_n": 0}, "h100-sxm", "bfloat16", "BLOCK_SIZE_N 0 is smaller than 1"),
        ({"block_size_n": 96}, "h100-sxm", "bfloat16", "BLOCK_SIZE_N 96 is not a power of two"),
        (
            {"block_size_k": 8},
            "h100-sxm",
            "bfloat16",
            "BLOCK_SIZE_K 8 is smaller than 16, the least a dot takes",
        ),
        (
            {"block_size_k": 16},
            "h100-sxm",
            "fp8",
            "BLOCK_SIZE_K 16 is smaller than 32, the least a dot takes",
        ),
        ({"num_warps": 64}, "h100-sxm", "bfloat16", "num_warps 64 is larger than 32"),
        ({"num_warps": 32}, "mi300x", "bfloat16", "num_warps 32 is larger than 16"),
        (
            {"block_size_k": 256, "num_stages": 4},
            "h100-sxm",
            "bfloat16",
            "it needs 393216 bytes of shared memory of 232448",
        ),
        ({"block_size_m": 128, "block_size_n": 256}, "mi300x", "fp8", None),
        ({"group_size_m": 3, "num_stages": 5}, "h100-sxm", "bfloat16", None),
    ],
)
def test_why_invalid(changes: dict[str, int], board: str, dtype: str, reason: str | None) -> None:
    assert why_invalid(replace(CONFIG, **changes), PRECISIONS[dtype], find_board(board)) == reason


@pytest.mark.parametrize("name", ["a100-sxm", "h100-sxm", "b200-sxm", "mi300x", "NVIDIA_L40S"])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_the_space_holds_exactly_the_valid_configs_of_its_rules(name: str, dtype: str) -> None:
    board, precision = find_board(name), PRECISIONS[dtype]
    found = list(fused_moe_space(precision, board))
    assert found == list(fused_moe_space(precision, board))
    assert len(found) == len(set(found))
    assert all(why_invalid(config, precision, board) is None for config in found)
    assert {config.tile for config in found} == set(fused_moe_tiles(precision, board))
    assert 500 < len(found) <= 100 * 2 * 4 * 4
    left_out = set(itertools.product((16, 64, 256), (16, 64, 256), (32, 256))) - {c.tile for c in found}
    stages = 2
    for m, n, k in left_out:
        smallest = replace(CONFIG, block_size_m=m, block_size_n=n, block_size_k=k, num_stages=stages)
        assert why_invalid(smallest, precision, board), (m, n, k)


@given(
    name=st.sampled_from(board_names()),
    dtype=st.sampled_from(sorted(PRECISIONS)),
    stages=st.integers(1, 6),
    more=st.sampled_from(["block_size_m", "block_size_n", "block_size_k"]),
)
def test_a_larger_tile_never_needs_less(name: str, dtype: str, stages: int, more: str) -> None:
    board, precision = find_board(name), PRECISIONS[dtype]
    small = replace(CONFIG, block_size_m=32, block_size_k=32, num_stages=stages)
    large = replace(small, **{more: 2 * getattr(small, more)})
    assert shared_bytes(small, precision, board) <= shared_bytes(large, precision, board)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "x86"])
@pytest.mark.parametrize("tokens", [1, 128, 4096])
def test_the_space_of_moeccs_kernels(target: str, tokens: int) -> None:
    shape = LayerShape(tokens=tokens, hidden=2048, intermediate=768, experts=128, top_k=8)
    base, limits = default_configs(shape, target), find_target(target)
    found = list(kernel_space(base, shape, limits))
    assert found == list(kernel_space(base, shape, limits))
    assert len(found) == len(set(found))
    assert all(kernels.why_invalid(config, shape, limits) is None for config in found)
    assert all((config.router, config.combine) == (base.router, base.combine) for config in found)
    assert base.gate_up.block_m in {config.gate_up.block_m for config in found}
    for kernel in ("gate_up", "down"):
        assert len({getattr(config, kernel) for config in found}) > 20


def test_names_of_boards() -> None:
    assert find_board("NVIDIA H100 80GB HBM3") == find_board("NVIDIA_H100_80GB_HBM3")
    assert replace(find_board("NVIDIA_H200"), name="h200-sxm") == find_board("h200-sxm")
    for name in board_names():
        assert isinstance(find_board(name), Board)
    with pytest.raises(InputError, match="unknown device 'NVIDIA_H21'; hint: did you mean 'NVIDIA_H20'?"):
        find_board("NVIDIA_H21")
    with pytest.raises(InputError, match="--device: device x86 is no GPU; hint: vLLM's fused_moe"):
        find_board("x86")


def test_every_figure_of_a_board_names_its_source() -> None:
    path = resources.files("moecc.autotune") / "data" / "boards.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    cited = set()
    for name, facts in document["boards"].items():
        figures = [facts] if "device" in facts else [facts[key] for key in facts if key != "target"]
        assert all(isinstance(figure, dict) for figure in figures), name
        cited |= {figure["source"] for figure in figures}
    assert cited == set(document["sources"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens: 0 is not positive; hint: use 1 or more"),
        ({"top_k": -1}, "--top-k: -1 is not positive; hint: use 1 or more"),
        ({"dtype": "fp4"}, "--dtype: unknown dtype 'fp4'; hint: known: bfloat16, float16, fp8, fp8_block"),
    ],
)
def test_impossible_shapes(changes: dict[str, int | str], message: str) -> None:
    sizes = {"experts": 8, "hidden": 64, "intermediate": 32, "top_k": 2, "tokens": 1, "dtype": "bfloat16"}
    with pytest.raises(InputError) as error:
        FusedMoeShape(**{**sizes, **changes})  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
