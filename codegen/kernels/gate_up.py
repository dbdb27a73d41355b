# mypy: ignore-errors
"""The first expert GEMM: gathers the tokens of each expert, multiplies by gate and up, applies the activation."""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.activation import activate
from moecc.codegen.kernels.common import accumulate_dot, load_inside, locate_tile, narrow, widen, wrap


@triton.jit
def gate_up_kernel(
    x_ptr,  # [tokens, HIDDEN]
    gate_up_ptr,  # [experts, COLUMNS, HIDDEN], or [experts, HIDDEN, COLUMNS] where TRANSPOSED
    gate_up_bias_ptr,  # [experts, COLUMNS]
    h_ptr,  # [rows, INTERMEDIATE] out with KEEP_H, rows in sorted order
    pre_ptr,  # [rows, COLUMNS] out with KEEP_PRE: what the activation is applied to, in the order of the weights
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    KEEP_H: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once.

    GATED: COLUMNS is 2 * INTERMEDIATE, gate first, or gate and up in turn where INTERLEAVED; else INTERMEDIATE.
    """
    COLUMNS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
    COLUMN_STRIDE: tl.constexpr = 1 if TRANSPOSED else HIDDEN
    K_STRIDE: tl.constexpr = COLUMNS if TRANSPOSED else 1
    COLUMN_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * COLUMN_BLOCKS:
        return
    tile, column_block = locate_tile(tl.program_id(0), num_tiles, COLUMN_BLOCKS, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(expert_offsets_ptr + expert + 1)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows and columns outside read what is inside: the loop then needs no mask for them, only the store does.
    token = tl.load(sorted_slots_ptr + row, is_row, other=0) // TOP_K
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + k[None, :]
    weights_ptr = gate_up_ptr + expert.to(tl.int64) * (COLUMNS * HIDDEN)
    gate_ptrs = (
        weights_ptr + wrap(n, INTERMEDIATE, BLOCK_N)[None, :] * (STEP * COLUMN_STRIDE) + k[:, None] * K_STRIDE
    )
    up_ptrs = gate_ptrs + UP * COLUMN_STRIDE
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        inside = k < HIDDEN - start
        x = load_inside(x_ptrs, inside[None, :], HIDDEN % BLOCK_K == 0)
        gate_weights = load_inside(gate_ptrs, inside[:, None], HIDDEN % BLOCK_K == 0)
        gate = accumulate_dot(x, gate_weights, gate, BACKEND)
        if GATED:
            up_weights = load_inside(up_ptrs, inside[:, None], HIDDEN % BLOCK_K == 0)
            up = accumulate_dot(x, up_weights, up, BACKEND)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * K_STRIDE
        up_ptrs += BLOCK_K * K_STRIDE

    is_column = n < INTERMEDIATE
    is_element = is_row[:, None] & is_column[None, :]
    if HAS_EXPERT_BIAS:
        bias_ptrs = gate_up_bias_ptr + expert * COLUMNS + n * STEP
        gate += widen(tl.load(bias_ptrs, is_column, other=0.0), BACKEND)[None, :]
        if GATED:
            up += widen(tl.load(bias_ptrs + UP, is_column, other=0.0), BACKEND)[None, :]
    if KEEP_PRE:
        pre_ptrs = pre_ptr + row.to(tl.int64)[:, None] * COLUMNS + n[None, :] * STEP
        tl.store(pre_ptrs, narrow(gate, pre_ptr.dtype.element_ty, BACKEND), is_element)
        if GATED:
            tl.store(pre_ptrs + UP, narrow(up, pre_ptr.dtype.element_ty, BACKEND), is_element)
    if KEEP_H:
        h = activate(gate, up, ACTIVATION, GATED, ALPHA, LIMIT)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
        tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty, BACKEND), is_element)
