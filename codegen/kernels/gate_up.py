# mypy: ignore-errors
"""The first expert GEMM: gathers the tokens of each expert, multiplies by gate and up, applies the activation."""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.common import accumulate_dot, locate_tile, narrow, widen


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The gated activations of `Activation`, in fp32."""
    if ACTIVATION == "silu_glu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_glu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        # A GPU's plain minimum would turn a NaN into the limit.
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1.0) * gate * tl.sigmoid(ALPHA * gate)


@triton.jit
def gate_up_kernel(
    x_ptr,  # [tokens, HIDDEN]
    gate_up_ptr,  # [experts, 2 * INTERMEDIATE, HIDDEN], gate rows first
    gate_up_bias_ptr,  # [experts, 2 * INTERMEDIATE]
    h_ptr,  # [rows, INTERMEDIATE] out, rows in sorted order
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once."""
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
    weights_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN)
    gate_ptrs = weights_ptr + (n % INTERMEDIATE)[None, :] * HIDDEN + k[:, None]
    up_ptrs = gate_ptrs + INTERMEDIATE * HIDDEN
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            x, gate_weights, up_weights = tl.load(x_ptrs), tl.load(gate_ptrs), tl.load(up_ptrs)
        else:
            inside = k < HIDDEN - start
            x = tl.load(x_ptrs, inside[None, :], other=0.0)
            gate_weights = tl.load(gate_ptrs, inside[:, None], other=0.0)
            up_weights = tl.load(up_ptrs, inside[:, None], other=0.0)
        gate = accumulate_dot(x, gate_weights, gate, BACKEND)
        up = accumulate_dot(x, up_weights, up, BACKEND)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K

    is_column = n < INTERMEDIATE
    if HAS_EXPERT_BIAS:
        bias_ptrs = gate_up_bias_ptr + expert * (2 * INTERMEDIATE) + n
        gate += widen(tl.load(bias_ptrs, is_column, other=0.0), BACKEND)[None, :]
        up += widen(tl.load(bias_ptrs + INTERMEDIATE, is_column, other=0.0), BACKEND)[None, :]
    h = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
    h_ptrs = h_ptr + row.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty, BACKEND), is_row[:, None] & is_column[None, :])
