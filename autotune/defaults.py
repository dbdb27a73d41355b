"""Configs that are good without tuning, by stated rules; the search starts from them."""

from __future__ import annotations

from dataclasses import replace

from moecc.codegen.config import (
    DTYPE_BYTES,
    CombineConfig,
    GemmConfig,
    KernelConfigs,
    LayerShape,
    RouterConfig,
    why_invalid,
)
from moecc.codegen.frozen import ONE_LAUNCH_TOKENS, tiles_max
from moecc.codegen.targets import Target, find_target
from moecc.errors import MoeccError

# Programs that keep a large GPU busy: about two for each of the 132 SMs of an H100.
BUSY_PROGRAMS = 256
# Programs that keep the threads of a CPU evenly busy, which take them in chunks.
X86_BUSY_PROGRAMS = 64


def default_configs(shape: LayerShape, target: str) -> KernelConfigs:
    """Configs for that shape on that target (a compiled target or `interpret`), always valid.

    1. BLOCK_M is the power of two that holds an expert's expected rows, 16 to 128: more is padding, less reads
       the weights twice.
    2. With 16 or 32 rows the GEMMs stream weights: narrow column blocks until enough programs run, long K blocks.
       With more rows they compute: tiles as large as accumulators fit in registers.
    3. BLOCK_K divides the reduced dimension where it can, so that the loop needs no mask.
    4. The router takes 16 tokens a program, more for many tokens; the hidden dimension is split until enough
       programs run.
    5. What does not fit the target gives up pipeline stages first, then BLOCK_K, then BLOCK_N.
    6. On x86 a program packs its rows once for each K block and streams its columns: see `_x86_configs`.
    Raises MoeccError for a shape for which nothing fits, InputError for an unknown target.
    """
    limits = find_target(target)
    if limits.backend == "interpret":
        return _interpreter_configs(shape)
    if limits.backend == "x86":
        return _x86_configs(shape)
    block_m = min(max(power_of_two_from(shape.rows_per_expert), 16), 128)
    configs = KernelConfigs(
        router=_router_config(shape, limits),
        gate_up=gemm_config(
            shape, limits, block_m, (shape.intermediate, shape.hidden), dots=shape.gate_up_dots
        ),
        down=gemm_config(shape, limits, block_m, (shape.hidden, shape.intermediate)),
        combine=CombineConfig(block_t=1, block_h=min(power_of_two_from(shape.hidden), 1024)),
    )
    return _fitted(configs, shape, limits)


def gemm_config(
    shape: LayerShape, target: Target, block_m: int, sizes: tuple[int, int], *, dots: int = 1
) -> GemmConfig:
    """Rules 2 and 3 for a grouped GEMM on a GPU with `dots` tiles side by side; sizes: columns, reduced dimension."""
    columns, reduced = sizes
    step = 128 // DTYPE_BYTES[shape.dtype]
    matrix_units = shape.dtype != "float32"
    if block_m <= 32:
        tiles = tiles_max(shape.tokens, shape.top_k, shape.slots or shape.experts, block_m)
        block_n = (128 if matrix_units else 64) // dots
        while block_n > 32 and tiles * -(-columns // block_n) < BUSY_PROGRAMS:
            block_n //= 2
        return GemmConfig(
            block_m=block_m,
            block_n=block_n,
            block_k=dividing_block(reduced, 2 * step),
            group_m=1,
            num_warps=4,
            num_stages=4,
        )
    wide = block_m == 128
    return GemmConfig(
        block_m=block_m,
        block_n=(256 if wide and target.wgmma_rows else 128) // dots if matrix_units else 64 // dots,
        block_k=dividing_block(reduced, step),
        num_warps=8 if wide else 4,
        num_stages=3,
    )


def _router_config(shape: LayerShape, target: Target) -> RouterConfig:
    columns = shape.router_columns
    # Larger token blocks read the gate less often, but ptxas and the AMD backend spilled with them elsewhere.
    block_t = 16
    if shape.tokens > ONE_LAUNCH_TOKENS and columns < 256 and target.warp_size == 32:
        block_t = 64 if columns == 64 else 32
    block_h = min(max(16384 // columns, 32), 128 if target.warp_size == 32 else 32)
    split_h, blocks = 1, -(-shape.hidden // block_h)
    while split_h < 16 and 4 * split_h <= blocks and 2 * split_h * -(-shape.tokens // block_t) <= 128:
        split_h *= 2
    while (split_h - 1) * -(-blocks // split_h) >= blocks:
        split_h //= 2
    return RouterConfig(
        block_t=block_t,
        block_h=block_h,
        split_h=split_h,
        num_warps=16 if columns >= 256 and target.warp_size == 32 else 8,
        num_stages=3 if target.warp_size == 32 else 2,
    )


def _interpreter_configs(shape: LayerShape) -> KernelConfigs:
    """Large tiles: the interpreter pays per operation, hardly per element."""
    block_m = min(max(power_of_two_from(shape.rows_per_expert), 16), 256)

    def gemm(columns: int, reduced: int) -> GemmConfig:
        return GemmConfig(
            block_m=block_m,
            block_n=min(max(power_of_two_from(columns), 16), 512),
            block_k=min(max(power_of_two_from(reduced), 16), 2048),
        )

    return KernelConfigs(
        router=RouterConfig(block_t=64, block_h=min(max(power_of_two_from(shape.hidden), 16), 2048)),
        gate_up=gemm(shape.intermediate, shape.hidden),
        down=gemm(shape.hidden, shape.intermediate),
        combine=CombineConfig(fused_tokens=32, block_t=64, block_h=2048),
    )


def _x86_configs(shape: LayerShape) -> KernelConfigs:
    """Weights stream from memory as they lie, whole K blocks of a row at a time; only a program's own rows are packed.

    Row tiles hold twice what an expert expects, 8 to 64 rows: a second tile would read the weights again, and rows
    that are not there cost a memory-bound program nothing. Columns are as many as leave enough programs, up to 128:
    more were slower, measured at 1024 tokens. Neighbours in the grid are row tiles of one column block: those of one
    expert follow each other and find its weights in the second cache. Launches are cheap: a combine of its own takes
    less than the last programs of a fused one, which the other threads wait for.
    """
    block_m = min(max(power_of_two_from(2 * shape.rows_per_expert), 8), 64)

    def gemm(columns: int, reduced: int, largest: int) -> GemmConfig:
        rows = shape.tokens * shape.top_k
        tiles = min(rows, shape.slots or shape.experts) + rows // block_m
        block_n = min(largest, max(power_of_two_from(columns), 16))
        while block_n > 32 and tiles * -(-columns // block_n) < X86_BUSY_PROGRAMS:
            block_n //= 2
        return GemmConfig(
            block_m=block_m,
            block_n=block_n,
            block_k=dividing_block(reduced, 2048),
            group_m=64,
            num_warps=1,
            num_stages=1,
        )

    block_t = min(power_of_two_from(shape.tokens), 16)
    return KernelConfigs(
        router=RouterConfig(
            block_t=block_t,
            block_h=dividing_block(shape.hidden, 2048),
            split_h=1,
            num_warps=1,
            num_stages=1,
        ),
        gate_up=gemm(shape.intermediate, shape.hidden, 128),
        down=gemm(shape.hidden, shape.intermediate, 256),
        combine=CombineConfig(
            fused_tokens=0, block_t=1, block_h=min(power_of_two_from(shape.hidden), 4096), num_warps=1
        ),
    )


def _fitted(configs: KernelConfigs, shape: LayerShape, target: Target) -> KernelConfigs:
    """Rule 5, for the GEMM that the predicate names."""
    while problem := why_invalid(configs, shape, target):
        if problem.startswith("router") and configs.router.block_h > 16:
            configs = replace(configs, router=_smaller_router(configs.router))
            continue
        gate_up = smaller_gemm(configs.gate_up) if problem.startswith("gate_up") else configs.gate_up
        down = smaller_gemm(configs.down) if problem.startswith("down") else configs.down
        if gate_up is None or down is None or (gate_up, down) == (configs.gate_up, configs.down):
            raise MoeccError(f"no kernel config fits {target.name}: {problem}", where="default configs")
        configs = replace(configs, gate_up=gate_up, down=down)
    return configs


def _smaller_router(config: RouterConfig) -> RouterConfig:
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    return replace(config, block_h=config.block_h // 2)


def smaller_gemm(config: GemmConfig) -> GemmConfig | None:
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    if config.block_k > 32:
        return replace(config, block_k=config.block_k // 2)
    if config.block_n > 16:
        return replace(config, block_n=config.block_n // 2)
    return None


def dividing_block(size: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides size, but at least 32."""
    return max(min(size & -size, largest), 32)


def power_of_two_from(value: float) -> int:
    """The smallest power of two that is not below value."""
    return 1 << max(int(-(-value // 1)) - 1, 0).bit_length()
