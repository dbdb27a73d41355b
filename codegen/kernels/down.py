# mypy: ignore-errors
"""The second expert GEMM, weighted, and the sum over each token's experts in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.common import (
    accumulate_dot,
    is_last_arrival,
    load_inside,
    locate_tile,
    narrow,
    widen,
    wrap,
)


@triton.jit
def combine_rows(
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    token,
    n,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """out[token, n] = residual + the token's slots, j = 0, 1, ...; slots of other devices' experts are skipped."""
    is_token = token < num_tokens
    inside = is_token[:, None] & (n < HIDDEN)[None, :]
    at = token.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for j in range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + j
        expert = tl.load(topk_ids_ptr + slot, is_token, other=-1)
        held = (expert >= 0) & (expert < NUM_EXPERTS)
        partial = tl.load(
            partial_ptr + slot[:, None] * HIDDEN + n[None, :], inside & held[:, None], other=0.0
        )
        total += widen(partial, BACKEND)
    if HAS_RESIDUAL:
        total += widen(tl.load(residual_ptr + at, inside, other=0.0), BACKEND)
    tl.store(out_ptr + at, narrow(total, out_ptr.dtype.element_ty, BACKEND), inside)


@triton.jit
def combine_if_last(
    counter_ptr,
    arrivals,
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    n,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """The last program of a column block sums the columns that all of them stored."""
    if is_last_arrival(counter_ptr, arrivals, BACKEND):
        for start in range(0, num_tokens, BLOCK_T):
            combine_rows(
                partial_ptr,
                topk_ids_ptr,
                residual_ptr,
                out_ptr,
                start + tl.arange(0, BLOCK_T),
                n,
                num_tokens,
                HIDDEN,
                TOP_K,
                NUM_EXPERTS,
                HAS_RESIDUAL,
                BLOCK_T,
                BLOCK_N,
                BACKEND,
            )


@triton.jit(do_not_specialize=["num_tokens"])
def down_kernel(
    h_ptr,  # [rows, INTERMEDIATE]
    down_ptr,  # [experts, HIDDEN, INTERMEDIATE], or [experts, INTERMEDIATE, HIDDEN] where TRANSPOSED
    down_bias_ptr,  # [experts, HIDDEN]
    topk_ids_ptr,  # [tokens, TOP_K]
    topk_weights_ptr,  # [tokens, TOP_K], with WEIGHTED
    partial_ptr,  # [tokens * TOP_K, HIDDEN] out, by slot
    residual_ptr,  # [tokens, HIDDEN], with FUSE_COMBINE
    out_ptr,  # [tokens, HIDDEN] out, with FUSE_COMBINE
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    counters_ptr,  # [column blocks] zero on entry and on exit, with FUSE_COMBINE
    num_tokens,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FUSE_COMBINE: tl.constexpr,
    COMBINE_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once."""
    COLUMN_STRIDE: tl.constexpr = 1 if TRANSPOSED else INTERMEDIATE
    K_STRIDE: tl.constexpr = HIDDEN if TRANSPOSED else 1
    COLUMN_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * COLUMN_BLOCKS:
        return
    tile, column_block = locate_tile(tl.program_id(0), num_tiles, COLUMN_BLOCKS, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(expert_offsets_ptr + expert + 1)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    h_ptrs = h_ptr + tl.where(is_row, row, 0).to(tl.int64)[:, None] * INTERMEDIATE + k[None, :]
    weights_ptr = down_ptr + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE)
    down_ptrs = weights_ptr + wrap(n, HIDDEN, BLOCK_N)[None, :] * COLUMN_STRIDE + k[:, None] * K_STRIDE
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        inside = k < INTERMEDIATE - start
        h = load_inside(h_ptrs, inside[None, :], INTERMEDIATE % BLOCK_K == 0)
        weights = load_inside(down_ptrs, inside[:, None], INTERMEDIATE % BLOCK_K == 0)
        total = accumulate_dot(h, weights, total, BACKEND)
        h_ptrs += BLOCK_K
        down_ptrs += BLOCK_K * K_STRIDE

    is_column = n < HIDDEN
    if HAS_EXPERT_BIAS:
        bias = tl.load(down_bias_ptr + expert * HIDDEN + n, is_column, other=0.0)
        total += widen(bias, BACKEND)[None, :]
    slot = tl.load(sorted_slots_ptr + row, is_row, other=0)
    if WEIGHTED:
        total *= tl.load(topk_weights_ptr + slot, is_row, other=0.0)[:, None]
    partial_ptrs = partial_ptr + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(
        partial_ptrs,
        narrow(total, partial_ptr.dtype.element_ty, BACKEND),
        is_row[:, None] & is_column[None, :],
    )

    if FUSE_COMBINE:
        combine_if_last(
            counters_ptr + column_block,
            num_tiles,
            partial_ptr,
            topk_ids_ptr,
            residual_ptr,
            out_ptr,
            n,
            num_tokens,
            HIDDEN,
            TOP_K,
            NUM_EXPERTS,
            HAS_RESIDUAL,
            COMBINE_T,
            BLOCK_N,
            BACKEND,
        )


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: (token blocks, column blocks)."""
    combine_rows(
        partial_ptr,
        topk_ids_ptr,
        residual_ptr,
        out_ptr,
        tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T),
        tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H),
        num_tokens,
        HIDDEN,
        TOP_K,
        NUM_EXPERTS,
        HAS_RESIDUAL,
        BLOCK_T,
        BLOCK_H,
        BACKEND,
    )
