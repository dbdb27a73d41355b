"""Configs for training that are good without tuning: those of the forward pass, and the backward pass beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moecc.autotune.defaults import (
    X86_BUSY_PROGRAMS,
    default_configs,
    dividing_block,
    gemm_config,
    power_of_two_from,
    smaller_gemm,
)
from moecc.codegen.config import (
    BackwardConfigs,
    GemmConfig,
    KernelConfigs,
    LayerShape,
    SumConfig,
    why_invalid,
)
from moecc.codegen.targets import Target, find_target
from moecc.errors import MoeccError


def training_configs(shape: LayerShape, target: str, forward: KernelConfigs | None = None) -> KernelConfigs:
    """`forward`, by default `default_configs`, with `backward`; always valid.

    1. grad_pre and grad_x walk the forward pass's tiles; grad_pre holds gate, up and sums at once, and takes half the
       columns of a plain GEMM, with 128 rows a quarter and two stages, of interleaved weights an eighth: with more of
       them it spilled on sm_90, with three stages on sm_80. There grad_x spilled with three stages too.
    2. Gradients of weights are as large as the weights: tiles as large as accumulators fit in registers. A step takes
       the rows that an expert expects, up to 64 on a GPU: more would be padding.
    3. What does not fit the target shrinks as in `default_configs`.
    Raises MoeccError for a shape for which nothing fits, InputError for an unknown target.
    """
    limits, configs = find_target(target), forward or default_configs(shape, target)
    block_m = configs.gate_up.block_m
    if limits.backend == "x86":
        backward = _x86_configs(shape, block_m)
    elif limits.backend == "interpret":
        backward = _interpreter_configs(shape, block_m)
    else:
        backward = BackwardConfigs(
            grad_pre=_grad_pre_config(shape, limits, block_m),
            grad_x=_grad_x_config(shape, limits, block_m),
            grad_gate_up=_weights_config(shape),
            grad_down=_weights_config(shape),
        )
    return _fitted(replace(configs, backward=backward), shape, limits)


def _grad_pre_config(shape: LayerShape, target: Target, block_m: int) -> GemmConfig:
    sizes = (shape.intermediate, shape.hidden)
    if block_m < 128:
        return gemm_config(shape, target, block_m, sizes, dots=2)
    return replace(
        gemm_config(shape, target, block_m, sizes, dots=8 if shape.interleaved else 4), num_stages=2
    )


def _grad_x_config(shape: LayerShape, target: Target, block_m: int) -> GemmConfig:
    config = gemm_config(shape, target, block_m, (shape.hidden, shape.gate_up_columns))
    return config if block_m < 128 or target.wgmma_rows else replace(config, num_stages=2)


def _rows_at_once(shape: LayerShape, least: int, most: int) -> int:
    return min(max(power_of_two_from(shape.rows_per_expert), least), most)


def _weights_config(shape: LayerShape) -> GemmConfig:
    if shape.dtype == "float32":
        return GemmConfig(block_m=64, block_n=64, block_k=16, num_warps=4, num_stages=2)
    return GemmConfig(
        block_m=128, block_n=128, block_k=_rows_at_once(shape, 16, 64), num_warps=8, num_stages=3
    )


def _interpreter_configs(shape: LayerShape, block_m: int) -> BackwardConfigs:
    def gemm(rows: int, columns: int, reduced: int) -> GemmConfig:
        return GemmConfig(
            block_m=rows,
            block_n=min(max(power_of_two_from(columns), 16), 512),
            block_k=min(max(power_of_two_from(reduced), 16), 2048),
        )

    hidden, inner, columns = shape.hidden, shape.intermediate, shape.gate_up_columns
    return BackwardConfigs(
        grad_pre=gemm(block_m, inner, hidden),
        grad_x=gemm(block_m, hidden, columns),
        grad_gate_up=gemm(256, hidden, shape.rows_per_expert.__ceil__()),
        grad_down=gemm(256, hidden, shape.rows_per_expert.__ceil__()),
    )


def _x86_configs(shape: LayerShape, block_m: int) -> BackwardConfigs:
    """Weights that lie the other way are read in stretches of a block's columns, which divide the row where they can:
    past its end the compiler loses sight of the stretch and reads single elements, several times as slow.

    Sizes measured on 16 experts of 2048 by 768 with 1, 8 and 64 rows each: up to 16 rows a tile is packed for nothing
    and reads wide stretches; square blocks of 128 were best for gradients of weights.
    """
    few = block_m <= 16
    reduced = 32 if few else 64
    rows = _rows_at_once(shape, 4, 64)
    hidden, inner, columns = shape.hidden, shape.intermediate, shape.gate_up_columns
    order = -1 if shape.transposed else 1
    return BackwardConfigs(
        grad_pre=_x86_gemm(shape, block_m, inner, 256 if few else 128, reduced),
        grad_x=_x86_gemm(shape, block_m, hidden, 256 if few else 128, reduced),
        grad_gate_up=_x86_outer((columns, hidden)[::order], rows),
        grad_down=_x86_outer((hidden, inner)[::order], rows),
        grad_bias=SumConfig(block_r=16, block_n=256, num_warps=1),
    )


def _x86_gemm(shape: LayerShape, block_m: int, columns: int, largest: int, block_k: int) -> GemmConfig:
    rows = shape.tokens * shape.top_k
    tiles = min(rows, shape.slots or shape.experts) + rows // block_m
    block_n = dividing_block(columns, largest)
    while block_n > 32 and tiles * -(-columns // block_n) < X86_BUSY_PROGRAMS:
        block_n //= 2
    return GemmConfig(
        block_m=block_m, block_n=block_n, block_k=block_k, group_m=64, num_warps=1, num_stages=1
    )


def _x86_outer(sizes: tuple[int, ...], reduced: int) -> GemmConfig:
    return GemmConfig(
        block_m=dividing_block(sizes[0], 128),
        block_n=dividing_block(sizes[1], 128),
        block_k=reduced,
        group_m=1,
        num_warps=1,
        num_stages=1,
    )


def _fitted(configs: KernelConfigs, shape: LayerShape, target: Target) -> KernelConfigs:
    """The GEMM of the backward pass that the predicate names, smaller until it fits."""
    while problem := why_invalid(configs, shape, target):
        kernel = problem.split()[0]
        config = configs.by_kernel.get(kernel)
        smaller = smaller_gemm(config) if isinstance(config, GemmConfig) else None
        if configs.backward is None or smaller is None:
            raise MoeccError(f"no kernel config fits {target.name}: {problem}", where="training configs")
        changed: dict[str, Any] = {kernel: smaller}
        configs = replace(configs, backward=replace(configs.backward, **changed))
    return configs
