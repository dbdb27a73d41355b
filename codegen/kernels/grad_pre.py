# mypy: ignore-errors
"""Back through the second expert GEMM and the activation, to what the first GEMM returned."""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.activation import clamp_gate, squash
from moecc.codegen.kernels.common import accumulate_dot, load_inside, locate_tile, narrow, widen, wrap


@triton.jit
def activate_backward(
    gate,
    up,
    grad_h,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """(h, grad_gate, grad_up); a value that was clamped has no gradient, one at the limit has, as in torch.clamp."""
    clamped_gate, clamped_up = clamp_gate(gate, up, ACTIVATION, LIMIT)
    value, slope = squash(clamped_gate, ACTIVATION, ALPHA)
    h, grad_gate, grad_up = value, grad_h * slope, grad_h
    if GATED:
        h = value * clamped_up
        grad_gate *= clamped_up
        grad_up *= value
    if ACTIVATION == "clamped_swiglu":
        grad_gate = tl.where(gate > LIMIT, 0.0, grad_gate)
        grad_up = tl.where((up < -LIMIT) | (up > LIMIT), 0.0, grad_up)
    return h, grad_gate, grad_up


@triton.jit
def add_in_first_block(
    part,
    column_block,
    rows_ptr,
    bias_ptr,
    BLOCK_M: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """part [BLOCK_M], and in the first of the column blocks the product of each row [HIDDEN] with the bias."""
    if column_block == 0:
        for start in range(0, HIDDEN, BLOCK):
            k = start + tl.arange(0, BLOCK)
            rows = tl.load(rows_ptr[:, None] + k[None, :], (k < HIDDEN)[None, :], other=0.0)
            bias = tl.load(bias_ptr + k, k < HIDDEN, other=0.0)
            part += tl.sum(widen(rows, BACKEND) * widen(bias, BACKEND)[None, :], axis=1)
    return part


@triton.jit(do_not_specialize=["num_slots"])
def grad_pre_kernel(
    grad_out_ptr,  # [tokens, HIDDEN]
    down_ptr,  # [experts, HIDDEN, INTERMEDIATE], or [experts, INTERMEDIATE, HIDDEN] where TRANSPOSED
    down_bias_ptr,  # [experts, HIDDEN]
    topk_weights_ptr,  # [tokens, TOP_K]
    pre_ptr,  # [rows, COLUMNS] as gate_up_kernel stores it
    grad_pre_ptr,  # [rows, COLUMNS] out with KEEP_GRAD_PRE; may be pre_ptr
    weighted_h_ptr,  # [rows, INTERMEDIATE] out with KEEP_H
    weight_parts_ptr,  # [column blocks, num_slots] out with KEEP_GRAD_WEIGHTS, whose sum is the gradient; fp32
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    num_slots,
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
    KEEP_GRAD_PRE: tl.constexpr,
    KEEP_H: tl.constexpr,
    KEEP_GRAD_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once.

    A row's gradient before its routing weight is grad_out of its token @ down. Its product with h is the gradient of
    the weight; times the weight it goes on through the activation.
    """
    COLUMNS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
    COLUMN_STRIDE: tl.constexpr = HIDDEN if TRANSPOSED else 1
    K_STRIDE: tl.constexpr = 1 if TRANSPOSED else INTERMEDIATE
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

    slot = tl.load(sorted_slots_ptr + row, is_row, other=0)
    rows_ptr = grad_out_ptr + (slot // TOP_K).to(tl.int64) * HIDDEN
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if KEEP_GRAD_PRE or KEEP_GRAD_WEIGHTS:
        grad_ptrs = rows_ptr[:, None] + k[None, :]
        weights_ptr = down_ptr + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE)
        down_ptrs = (
            weights_ptr + wrap(n, INTERMEDIATE, BLOCK_N)[None, :] * COLUMN_STRIDE + k[:, None] * K_STRIDE
        )
        for start in range(0, HIDDEN, BLOCK_K):
            inside = k < HIDDEN - start
            grad = load_inside(grad_ptrs, inside[None, :], HIDDEN % BLOCK_K == 0)
            weights = load_inside(down_ptrs, inside[:, None], HIDDEN % BLOCK_K == 0)
            total = accumulate_dot(grad, weights, total, BACKEND)
            grad_ptrs += BLOCK_K
            down_ptrs += BLOCK_K * K_STRIDE

    is_column = n < INTERMEDIATE
    is_element = is_row[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + n[None, :] * STEP
    gate = widen(tl.load(pre_ptr + at, is_element, other=0.0), BACKEND)
    up = gate
    if GATED:
        up = widen(tl.load(pre_ptr + at + UP, is_element, other=0.0), BACKEND)
    weight = tl.load(topk_weights_ptr + slot, is_row, other=0.0)
    h, grad_gate, grad_up = activate_backward(
        gate, up, total * weight[:, None], ACTIVATION, GATED, ALPHA, LIMIT
    )
    if KEEP_GRAD_WEIGHTS:
        part = tl.sum(tl.where(is_element, total * h, 0.0), axis=1)
        if HAS_EXPERT_BIAS:
            bias_ptr = down_bias_ptr + expert * HIDDEN
            part = add_in_first_block(
                part, column_block, rows_ptr, bias_ptr, BLOCK_M, HIDDEN, BLOCK_K, BACKEND
            )
        tl.store(weight_parts_ptr + column_block.to(tl.int64) * num_slots + slot, part, is_row)
    if KEEP_GRAD_PRE:
        tl.store(grad_pre_ptr + at, narrow(grad_gate, grad_pre_ptr.dtype.element_ty, BACKEND), is_element)
        if GATED:
            tl.store(
                grad_pre_ptr + at + UP, narrow(grad_up, grad_pre_ptr.dtype.element_ty, BACKEND), is_element
            )
    if KEEP_H:
        h_ptrs = weighted_h_ptr + row.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
        h *= weight[:, None]
        tl.store(h_ptrs, narrow(h, weighted_h_ptr.dtype.element_ty, BACKEND), is_element)
