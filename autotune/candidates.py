"""What is measured next: one kernel at a time is varied around the best configs so far, likely ones first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from moecc.autotune.space import gemm_space, row_tiles
from moecc.codegen.config import (
    DTYPE_BYTES,
    CombineConfig,
    GemmConfig,
    KernelConfigs,
    LayerShape,
    RouterConfig,
    why_invalid,
)
from moecc.codegen.targets import Target

# Relative costs on one core of a CPU, of bytes moved: from memory, into packed rows, and out of and into the second
# cache. Only their order of magnitude matters, for they order candidates and decide nothing.
X86_MEMORY, X86_PACK, X86_CACHE = 1.0, 0.5, 0.25
# What a masked last block of columns or of the reduced dimension adds to a GEMM.
X86_MASKED = 1.1
_STAGE_SIZES = {"rows": 8, "gate_up": 8, "down": 8, "router": 3, "combine": 3}


def next_candidates(
    best: KernelConfigs, shape: LayerShape, target: Target, is_known: Callable[[KernelConfigs], bool]
) -> list[KernelConfigs]:
    """The configs of the first stage that still has some which nobody measured; empty when no stage has.

    The stages vary the row tile of both GEMMs, then gate_up, down, router and combine, each with all else as in
    `best`: times of kernels add. When `best` has changed, earlier stages have new neighbours, and come first again.
    """
    stages: tuple[tuple[str, Callable[..., Iterator[KernelConfigs]]], ...] = (
        ("rows", _row_tiles),
        ("gate_up", _gemms),
        ("down", _gemms),
        ("router", _routers),
        ("combine", _combines),
    )
    for name, variants in stages:
        fresh = [
            configs
            for configs in dict.fromkeys(variants(name, best, shape, target))
            if not is_known(configs) and why_invalid(configs, shape, target) is None
        ]
        if fresh:
            return fresh[: _STAGE_SIZES[name]]
    return []


def _row_tiles(name: str, best: KernelConfigs, shape: LayerShape, target: Target) -> Iterator[KernelConfigs]:
    for block_m in row_tiles(shape, target):
        yield replace(
            best,
            gate_up=replace(best.gate_up, block_m=block_m),
            down=replace(best.down, block_m=block_m),
        )


def _gemms(name: str, best: KernelConfigs, shape: LayerShape, target: Target) -> Iterator[KernelConfigs]:
    current: GemmConfig = getattr(best, name)

    def place(gemm: GemmConfig) -> tuple[float, float]:
        if target.backend == "x86":
            return x86_cost(gemm, name, shape), _distance(gemm, current)
        return _distance(gemm, current), 0.0

    for gemm in sorted(gemm_space(current.block_m, name, shape, target), key=place):
        yield replace(best, gate_up=gemm) if name == "gate_up" else replace(best, down=gemm)


def _routers(name: str, best: KernelConfigs, shape: LayerShape, target: Target) -> Iterator[KernelConfigs]:
    """Half and twice of everything; a routing made elsewhere has no router."""
    if shape.slots is None:
        for config in _neighbours(best.router, RouterConfig, target):
            yield replace(best, router=config)


def _combines(name: str, best: KernelConfigs, shape: LayerShape, target: Target) -> Iterator[KernelConfigs]:
    """A launch of its own, or the last programs of the down kernel; then half and twice of everything."""
    tokens = shape.expert_tokens
    fused = 0 if tokens <= best.combine.fused_tokens else tokens
    yield replace(best, combine=replace(best.combine, fused_tokens=fused))
    if tokens > best.combine.fused_tokens:
        for config in _neighbours(best.combine, CombineConfig, target):
            yield replace(best, combine=config)


def _neighbours(config: Any, kind: type[Any], target: Target) -> Iterator[Any]:
    fixed = {"fused_tokens", *(("num_warps", "num_stages") if target.backend == "x86" else ())}
    for name, factor in itertools.product(vars(config), (2, 0.5)):
        value = int(getattr(config, name) * factor)
        if name not in fixed and value >= 1:
            yield kind(**{**vars(config), name: value})


def x86_cost(gemm: GemmConfig, kernel: str, shape: LayerShape) -> float:
    """Of one GEMM on a CPU, for ordering: the reasons that stand with the default configs, counted in bytes.

    1. Weights stream from memory once for each row tile of an expert; tiles that follow each other in the grid
       (group_m > 1) find them in the second cache.
    2. A program packs its rows anew for each block of columns.
    3. Sums leave the registers and come back for each block of the reduced dimension.
    4. Columns that do not divide evenly, and programs too few to keep all threads busy, leave time unused.
    """
    columns, reduced = (
        (shape.intermediate, shape.hidden) if kernel == "gate_up" else (shape.hidden, shape.intermediate)
    )
    wide = shape.gate_up_columns if kernel == "gate_up" else columns
    element, experts = DTYPE_BYTES[shape.dtype], shape.slots or shape.experts
    rows = shape.tokens * shape.top_k
    # Of experts that tokens choose independently and alike.
    occupied = experts * (1 - math.exp(-shape.rows_per_expert))
    tiles_each = max(1.0, rows / occupied / gemm.block_m + 0.5 * (gemm.block_m < 2 * rows / occupied))
    again = (tiles_each - 1) * (X86_CACHE if gemm.group_m > 1 else X86_MEMORY)
    weights = occupied * wide * reduced * element * (X86_MEMORY + again)
    column_blocks, steps = math.ceil(columns / gemm.block_n), math.ceil(reduced / gemm.block_k)
    packed = rows * reduced * element * column_blocks * X86_PACK
    sums = rows * wide * 4 * (steps - 1) * X86_CACHE
    programs = occupied * tiles_each * column_blocks
    masked = X86_MASKED ** ((columns % gemm.block_n > 0) + (reduced % gemm.block_k > 0))
    return (weights + packed + sums) * masked * (1 + 2 / programs)


def _distance(one: GemmConfig, other: GemmConfig) -> float:
    """Doublings and halvings between them."""
    return sum(
        abs(math.log2(value / getattr(other, name))) for name, value in vars(one).items() if name != "block_m"
    )
