# mypy: ignore-errors
"""Gradients of an expert's weights and biases: sums over its rows, in sorted order, each written by one program."""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.common import accumulate_dot, locate_tile, narrow, widen, wrap


@triton.jit
def grad_weights_kernel(
    left_ptr,  # [tokens, M] with LEFT_BY_TOKEN, else [rows, M]
    right_ptr,  # [rows, N] with LEFT_BY_TOKEN, else [tokens, N]
    grad_ptr,  # [experts, M, N] out; zero for experts without rows
    sorted_slots_ptr,
    expert_offsets_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """grad[expert] = the sum over the expert's rows of left^T right. Grid: experts * blocks of M * blocks of N."""
    ROW_BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (ROW_BLOCKS * COLUMN_BLOCKS)
    row_block, column_block = locate_tile(
        tl.program_id(0) % (ROW_BLOCKS * COLUMN_BLOCKS), ROW_BLOCKS, COLUMN_BLOCKS, GROUP_M
    )
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    end = tl.load(expert_offsets_ptr + expert + 1)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.load(expert_offsets_ptr + expert), end, BLOCK_K):
        row = start + k
        is_row = row < end
        token = tl.load(sorted_slots_ptr + row, is_row, other=0) // TOP_K
        left_at = (token if LEFT_BY_TOKEN else row).to(tl.int64) * M
        right_at = (row if LEFT_BY_TOKEN else token).to(tl.int64) * N
        # Rows past the end are zero on both sides: what lies there may be NaN.
        left = tl.load(left_ptr + left_at[None, :] + wrap(m, M, BLOCK_M)[:, None], is_row[None, :], other=0.0)
        right = tl.load(
            right_ptr + right_at[:, None] + wrap(n, N, BLOCK_N)[None, :], is_row[:, None], other=0.0
        )
        total = accumulate_dot(left, right, total, BACKEND)

    grad_ptrs = grad_ptr + expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    is_element = (m < M)[:, None] & (n < N)[None, :]
    tl.store(grad_ptrs, narrow(total, grad_ptr.dtype.element_ty, BACKEND), is_element)


@triton.jit
def grad_bias_kernel(
    values_ptr,  # [tokens, N] with BY_TOKEN, else [rows, N]
    topk_weights_ptr,  # [tokens, TOP_K], with BY_TOKEN
    grad_ptr,  # [experts, N] out; zero for experts without rows
    sorted_slots_ptr,
    expert_offsets_ptr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """grad[expert] = the sum of the expert's rows; BY_TOKEN: of its tokens' times their weights.

    Grid: (experts, column blocks).
    """
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(expert_offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(tl.load(expert_offsets_ptr + expert), end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        is_row = row < end
        slot = tl.load(sorted_slots_ptr + row, is_row, other=0)
        at = (slot // TOP_K if BY_TOKEN else row).to(tl.int64)
        is_element = is_row[:, None] & (n < N)[None, :]
        values = widen(tl.load(values_ptr + at[:, None] * N + n[None, :], is_element, other=0.0), BACKEND)
        if BY_TOKEN:
            values *= tl.load(topk_weights_ptr + slot, is_row, other=0.0)[:, None]
        total += tl.sum(values, axis=0)
    grad_ptrs = grad_ptr + expert.to(tl.int64) * N + n
    tl.store(grad_ptrs, narrow(total, grad_ptr.dtype.element_ty, BACKEND), n < N)
