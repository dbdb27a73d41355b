"""The configs that tuning chooses from: built from rules, filtered by the one predicate of each kernel.

The order is fixed: equal arguments give equal sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from moecc.autotune.boards import Board
from moecc.autotune.fused_moe import FusedMoeConfig, Precision, why_invalid
from moecc.codegen import config as kernels
from moecc.codegen.config import GemmConfig, KernelConfigs, LayerShape
from moecc.codegen.targets import Target

Tile = tuple[int, int, int]

_GPU_WARPS = (4, 8)
_AMD_WARPS = (2, 4, 8)
_GPU_STAGES = (2, 3, 4, 5)
_GROUPS = (1, 16, 32, 64)


@cache
def fused_moe_tiles(precision: Precision, board: Board) -> tuple[Tile, ...]:
    """(BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K) that are valid with the fewest stages; at most 100.

    1. Rows: 16, the least that a matrix unit fills, to 256, the most whose accumulator registers hold.
    2. Columns: 16 to 256, likewise.
    3. Reduced: 32, one load of a warp, to 256.
    """
    sizes = itertools.product(_powers(16, 256), _powers(16, 256), _powers(32, 256))
    return tuple(tile for tile in sizes if any(True for _ in tile_configs(tile, precision, board)))


def fused_moe_space(precision: Precision, board: Board) -> Iterator[FusedMoeConfig]:
    """Every valid config of vLLM's kernel, tile by tile."""
    for tile in fused_moe_tiles(precision, board):
        yield from tile_configs(tile, precision, board)


def tile_configs(tile: Tile, precision: Precision, board: Board) -> Iterator[FusedMoeConfig]:
    """The valid configs of one tile.

    4. Warps: 4 and 8; AMD's are twice as wide and 2 of them are tried too.
    5. Stages: 2 to 5; on AMD 2, the only count whose LDS is known.
    6. Groups of row tiles: none, and 16 to 64, which share weights in the L2 cache.
    """
    warps, stages = (_AMD_WARPS, (2,)) if board.is_amd else (_GPU_WARPS, _GPU_STAGES)
    for num_warps, num_stages, group_size_m in itertools.product(warps, stages, _GROUPS):
        config = FusedMoeConfig(
            block_size_m=tile[0],
            block_size_n=tile[1],
            block_size_k=tile[2],
            group_size_m=group_size_m,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if why_invalid(config, precision, board) is None:
            yield config


def kernel_space(base: KernelConfigs, shape: LayerShape, target: Target) -> Iterator[KernelConfigs]:
    """Every valid variant of moecc's two GEMMs, the other kernels as in `base`.

    gate_up and down share the row tile and are varied one after the other, not together: their times add, so the
    best of each is the best of both. First all of gate_up with down's columns as in `base`, then all of down.
    """
    seen: set[KernelConfigs] = set()
    for block_m in row_tiles(shape, target):
        for kernel in ("gate_up", "down"):
            for gemm in gemm_space(block_m, kernel, shape, target):
                rows = {name: replace(getattr(base, name), block_m=block_m) for name in ("gate_up", "down")}
                configs = replace(base, **{**rows, kernel: gemm})
                if configs not in seen and kernels.why_invalid(configs, shape, target) is None:
                    seen.add(configs)
                    yield configs


def gemm_space(block_m: int, kernel: str, shape: LayerShape, target: Target) -> Iterator[GemmConfig]:
    """Configs of one GEMM before validity.

    1. Columns: 16, or 32 on x86, up to what the layer has, 256 at most; gate_up has two weight tiles, so half.
    2. Reduced: powers of two up to the reduced dimension: 256 on GPUs, where tiles lie in shared memory; on x86
       from 256 to 2048, where a row streams through the caches.
    3. Warps, stages and groups as for vLLM's kernel; on x86 a program is one thread, and neighbours in the grid are
       row tiles of one column block (64) or column blocks of one row tile (1).
    """
    columns, reduced = (
        (shape.intermediate, shape.hidden) if kernel == "gate_up" else (shape.hidden, shape.intermediate)
    )
    widest = min(_power_from(columns), 128 if kernel == "gate_up" else 256)
    if target.backend == "x86":
        blocks = itertools.product(_powers(32, widest), _powers(256, min(_power_from(reduced), 2048)))
        for (block_n, block_k), group_m in itertools.product(blocks, (1, 64)):
            yield GemmConfig(
                block_m=block_m,
                block_n=block_n,
                block_k=block_k,
                group_m=group_m,
                num_warps=1,
                num_stages=1,
            )
        return
    warps, stages = (_AMD_WARPS, (2,)) if target.backend == "hip" else (_GPU_WARPS, _GPU_STAGES)
    blocks = itertools.product(_powers(16, widest), _powers(32, min(_power_from(reduced), 256)))
    for (block_n, block_k), num_warps, num_stages, group_m in itertools.product(
        blocks, warps, stages, _GROUPS
    ):
        yield GemmConfig(
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            group_m=group_m,
            num_warps=num_warps,
            num_stages=num_stages,
        )


def row_tiles(shape: LayerShape, target: Target) -> list[int]:
    """`block_m` of both GEMMs, around an expert's expected rows: from a quarter (skew leaves most experts with less) to
    eight times."""
    least, most = (1, 128) if target.backend == "x86" else (16, 256)
    expected = _power_from(shape.rows_per_expert)
    low, high = min(max(expected // 4, least), most), min(max(expected * 8, least), most)
    return list(_powers(low, high))


def _powers(low: int, high: int) -> tuple[int, ...]:
    """Powers of two from low to high, both included; low is one. At least low."""
    return tuple(low << step for step in range(max(high // low, 1).bit_length()))


def _power_from(value: float) -> int:
    """The smallest power of two that is not below value."""
    return 1 << max(int(-(-value // 1)) - 1, 0).bit_length()
