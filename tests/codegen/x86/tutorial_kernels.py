# mypy: ignore-errors
"""The kernels of Triton's tutorials, written anew from what they describe."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_vectors(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out_ptr + at, tl.load(x_ptr + at, inside) + tl.load(y_ptr + at, inside), inside)


@triton.jit
def softmax_rows(x_ptr, out_ptr, rows, columns, x_stride, out_stride, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < columns
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + column, inside, other=-float("inf")).to(tl.float32)
        numerator = tl.exp(x - tl.max(x, axis=0))
        out = numerator / tl.sum(numerator, axis=0)
        tl.store(out_ptr + row * out_stride + column, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def multiply_matrices(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    a_m,
    a_k,
    b_k,
    b_n,
    c_m,
    c_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * blocks_n
    first_m = tl.program_id(0) // per_group * GROUP_M
    in_group = min(blocks_m - first_m, GROUP_M)
    block_m = first_m + tl.program_id(0) % per_group % in_group
    block_n = tl.program_id(0) % per_group // in_group
    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * a_m + k[None, :] * a_k
    b_ptrs = b_ptr + k[:, None] * b_k + n[None, :] * b_n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=k[None, :] < K - start * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - start * BLOCK_K, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * a_k
        b_ptrs += BLOCK_K * b_k
    if ACTIVATION == "leaky_relu":
        total = leaky_relu(total)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + m[:, None] * c_m + n[None, :] * c_n
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def drop_out(x_ptr, out_ptr, size, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    tl.store(out_ptr + at, tl.where(tl.rand(seed, at) > p, x / (1 - p), 0.0), mask=at < size)


@triton.jit
def layer_norm(x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * stride
    y_ptr += row * stride
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=0) / size
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        x = tl.where(at < size, x - mean, 0.0)
        squares += x * x
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / size + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(w_ptr + at, mask=inside) + tl.load(b_ptr + at, mask=inside)
        tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def layer_norm_backward(
    dx_ptr,
    dy_ptr,
    dw_ptr,
    db_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    locks_ptr,
    stride,
    size,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a row; dw and db of GROUPS groups of rows, each summed under a lock of its own."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    group = row % GROUPS
    lock_ptr, count_ptr = locks_ptr + group, locks_ptr + GROUPS + group
    x = tl.load(x_ptr + row * stride + at, mask=inside, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride + at, mask=inside, other=0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=inside).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    normal = tl.where(inside, (x - mean) * rstd, 0.0)
    scaled = tl.where(inside, w * dy, 0.0)
    along = tl.sum(normal * scaled, axis=0) / size
    average = tl.sum(scaled, axis=0) / size
    tl.store(dx_ptr + row * stride + at, (scaled - (normal * along + average)) * rstd, mask=inside)
    dw, db = dy * normal, dy
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    if tl.load(count_ptr) == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        dw += tl.load(dw_ptr + group * size + at, mask=inside)
        db += tl.load(db_ptr + group * size + at, mask=inside)
    tl.store(dw_ptr + group * size + at, dw, mask=inside)
    tl.store(db_ptr + group * size + at, db, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    size,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid: (query blocks, heads); every head is [size, DIM] and contiguous."""
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64) * size * DIM
    q_block = tl.make_block_ptr(q_ptr + head, (size, DIM), (DIM, 1), (start_m, 0), (BLOCK_M, DIM), (1, 0))
    k_block = tl.make_block_ptr(k_ptr + head, (DIM, size), (1, DIM), (0, 0), (DIM, BLOCK_N), (0, 1))
    v_block = tl.make_block_ptr(v_ptr + head, (size, DIM), (DIM, 1), (0, 0), (BLOCK_N, DIM), (1, 0))
    out_block = tl.make_block_ptr(out_ptr + head, (size, DIM), (DIM, 1), (start_m, 0), (BLOCK_M, DIM), (1, 0))
    m = start_m + tl.arange(0, BLOCK_M)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, DIM], tl.float32)
    q = tl.load(q_block, boundary_check=(0,), padding_option="zero")
    end = min(start_m + BLOCK_M, size) if CAUSAL else size
    for start_n in range(0, end, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        k = tl.load(k_block, boundary_check=(1,), padding_option="zero")
        scores = tl.dot(q, k, input_precision="ieee") * (scale * 1.44269504)
        visible = n[None, :] < size
        if CAUSAL:
            visible &= m[:, None] >= n[None, :]
        scores = tl.where(visible, scores, -1.0e30)
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.where(visible, tl.math.exp2(scores - larger[:, None]), 0.0)
        shrink = tl.math.exp2(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_block, boundary_check=(0,), padding_option="zero")
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = larger
        k_block = tl.advance(k_block, (0, BLOCK_N))
        v_block = tl.advance(v_block, (BLOCK_N, 0))
    tl.store(out_block, (out / total[:, None]).to(out_ptr.dtype.element_ty), boundary_check=(0,))


@triton.jit
def multiply_groups(
    a_addresses,
    b_addresses,
    c_addresses,
    sizes_ptr,
    groups,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of several sizes: their tiles are dealt out to a fixed number of programs."""
    tile = tl.program_id(0)
    before = 0
    for group in range(groups):
        M = tl.load(sizes_ptr + group * 3)
        N = tl.load(sizes_ptr + group * 3 + 1)
        K = tl.load(sizes_ptr + group * 3 + 2)
        blocks_n = tl.cdiv(N, BLOCK_N)
        tiles = tl.cdiv(M, BLOCK_M) * blocks_n
        while tile >= before and tile < before + tiles:
            a_ptr = tl.load(a_addresses + group).to(tl.pointer_type(tl.float16))
            b_ptr = tl.load(b_addresses + group).to(tl.pointer_type(tl.float16))
            c_ptr = tl.load(c_addresses + group).to(tl.pointer_type(tl.float16))
            m = (tile - before) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (tile - before) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, K, BLOCK_K):
                inside_a = (m[:, None] < M) & (start + k[None, :] < K)
                inside_b = (start + k[:, None] < K) & (n[None, :] < N)
                a = tl.load(a_ptr + m[:, None] * K + start + k[None, :], mask=inside_a, other=0.0)
                b = tl.load(b_ptr + (start + k[:, None]) * N + n[None, :], mask=inside_b, other=0.0)
                total = tl.dot(a, b, total)
            inside = (m[:, None] < M) & (n[None, :] < N)
            tl.store(c_ptr + m[:, None] * N + n[None, :], total.to(tl.float16), mask=inside)
            tile += PROGRAMS
        before += tiles
