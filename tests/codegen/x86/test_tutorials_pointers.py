# mypy: ignore-errors
"""Block pointers and tensor descriptors, at sizes that their blocks do not divide, and kernels that live by them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
from guarded import Guarded, assert_close

pytestmark = [
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with activated(request.param):
        yield


@triton.jit
def shift_block(x_ptr, out_ptr, M, N, row, column, BM: tl.constexpr, BN: tl.constexpr, PAD: tl.constexpr):
    """The block at (row, column), which may stick out on all sides, into the same place."""
    source = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (row, column), (BM, BN), (1, 0))
    target = tl.make_block_ptr(out_ptr, (M, N), (N, 1), (row, column), (BM, BN), (1, 0))
    tl.store(target, tl.load(source, boundary_check=(0, 1), padding_option=PAD) + 1, boundary_check=(0, 1))


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (-2, -3), (7, 30), (-20, 0), (13, 37)])
def test_blocks_that_stick_out(place: tuple[int, int]) -> None:
    x, out = torch.randn(13, 37), Guarded(13, 37)
    shift_block[(1,)](x, out.tensor, 13, 37, *place, BM=8, BN=16, PAD="zero")
    rows, columns = (slice(max(0, at), max(0, at + size)) for at, size in zip(place, (8, 16), strict=True))
    expected = torch.full((13, 37), float("nan"))
    expected[rows, columns] = x[rows, columns] + 1
    assert torch.equal(out.result().nan_to_num(99), expected.nan_to_num(99))


@triton.jit
def load_padded(x_ptr, out_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr, PAD: tl.constexpr):
    source = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    tile = tl.load(source, boundary_check=(0, 1), padding_option=PAD)
    tl.store(out_ptr + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_padding(padding: str, dtype: torch.dtype) -> None:
    x, out = torch.randn(5, 11).to(dtype), Guarded(8, 16, dtype=dtype)
    load_padded[(1,)](x, out.tensor, 5, 11, BM=8, BN=16, PAD=padding)
    expected = torch.full((8, 16), 0.0 if padding == "zero" else float("nan"), dtype=dtype)
    expected[:5, :11] = x
    assert torch.equal(out.result().nan_to_num(99), expected.nan_to_num(99))


@triton.jit
def matmul_by_block_pointers(
    a_ptr, b_ptr, c_ptr, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, B_ORDER: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    a_block = tl.make_block_ptr(a_ptr, (M, K), (sam, sak), (m, 0), (BM, BK), (1, 0))
    b_block = tl.make_block_ptr(b_ptr, (K, N), (sbk, sbn), (0, n), (BK, BN), B_ORDER)
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        a = tl.load(a_block, boundary_check=(0, 1))
        b = tl.load(b_block, boundary_check=(0, 1))
        acc += tl.dot(a, b)
        a_block = tl.advance(a_block, (0, BK))
        b_block = tl.advance(b_block, (BK, 0))
    c_block = tl.make_block_ptr(c_ptr, (M, N), (N, 1), (m, n), (BM, BN), (1, 0))
    tl.store(c_block, acc, boundary_check=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_by_block_pointers(dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(45, 100).to(dtype), torch.randn(100, 70).to(dtype)
    b = b.t().contiguous().t() if transposed else b
    out = Guarded(45, 70)
    matmul_by_block_pointers[(2, 3)](
        a, b, out.tensor, 45, 70, 100, *a.stride(), *b.stride(),
        BM=32, BN=32, BK=32, B_ORDER=(0, 1) if transposed else (1, 0),
    )  # fmt: skip
    assert_close(out.result(), a.double() @ b.double(), 2e-6)


@triton.jit
def persistent_matmul(
    a_desc, b_desc, c_desc, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    count_m, count_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), count_m * count_n, tl.num_programs(0), flatten=True):
        in_group = GROUP * count_n
        first = tile // in_group * GROUP
        size = min(count_m - first, GROUP)
        m, n = (first + tile % in_group % size) * BM, (tile % in_group // size) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(K, BK)):
            a, b = a_desc.load([m, k * BK]), b_desc.load([n, k * BK])
            acc = tl.dot(a, b.T, acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        c_desc.store([m, n], left.to(c_desc.dtype))
        c_desc.store([m, n + BN // 2], right.to(c_desc.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(100, 96, 80), (33, 200, 64)])
def test_persistent_matmul_by_descriptors(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = Guarded(m, n, dtype=dtype)
    descriptors = [
        TensorDescriptor.from_tensor(tensor, block)
        for tensor, block in ((a, [32, 32]), (b, [64, 32]), (out.tensor, [32, 32]))
    ]
    persistent_matmul[(3,)](*descriptors, m, n, k, BM=32, BN=64, BK=32, GROUP=2)
    assert_close(out.result(), a.double() @ b.double().T, TOLERANCE[dtype])


@triton.jit
def attend_by_descriptors(
    q_ptr, k_ptr, v_ptr, out_ptr, HEADS, SIZE, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Descriptors made in the kernel, over all heads of a batch in one matrix; stages as the tutorial has them."""
    first = tl.program_id(1) * SIZE
    total, log2e = HEADS * SIZE, 1.4426950408889634
    q_desc = tl.make_tensor_descriptor(q_ptr, [total, D], [D, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k_ptr, [total, D], [D, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, [total, D], [D, 1], [BN, D])
    out_desc = tl.make_tensor_descriptor(out_ptr, [total, D], [D, 1], [BM, D])
    start = tl.program_id(0) * BM
    q = q_desc.load([first + start, 0])
    m = start + tl.arange(0, BM)
    best = tl.full([BM], -float("inf"), tl.float32)
    total_weight = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for stage in tl.static_range(2 if CAUSAL else 1):
        if CAUSAL:
            low = stage * start
            high = start + stage * BM
        else:
            low = 0
            high = SIZE
        for n in range(low, high, BN):
            n = tl.multiple_of(n, BN)
            scores = tl.dot(q, k_desc.load([first + n, 0]).T) * (scale * log2e)
            if CAUSAL and stage == 1:
                scores = tl.where(m[:, None] >= n + tl.arange(0, BN)[None, :], scores, -1e6)
            new = tl.maximum(best, tl.max(scores, 1))
            weights = tl.math.exp2(scores - new[:, None])
            alpha = tl.math.exp2(best - new)
            acc = acc * alpha[:, None]
            acc = tl.dot(weights.to(q.dtype), v_desc.load([first + n, 0]), acc)
            total_weight = total_weight * alpha + tl.sum(weights, 1)
            best = new
    out_desc.store([first + start, 0], (acc / total_weight[:, None]).to(q.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_descriptors(causal: bool, dim: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 3, 192, dim).to(dtype)
    out = Guarded(3, 192, dim, dtype=dtype)
    attend_by_descriptors[(3, 3)](q, k, v, out.tensor, 3, 192, 0.5, CAUSAL=causal, D=dim, BM=64, BN=32)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.double() for tensor in (q, k, v)), is_causal=causal, scale=0.5
    )
    assert_close(out.result(), exact, TOLERANCE[dtype])


@triton.jit
def copy_transposed(in_desc, out_desc, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    out_desc.store([n, m], in_desc.load([m, n]).T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bfloat16])
def test_a_matrix_is_transposed_by_descriptors(dtype: torch.dtype) -> None:
    x, out = (torch.randn(37, 48) * 30).to(dtype), Guarded(48, 48, dtype=dtype)
    source = TensorDescriptor(x, [37, 48], [48, 1], [16, 16])
    target = TensorDescriptor(out.tensor, [48, 37], [48, 1], [16, 16])
    copy_transposed[(3, 3)](source, target, BM=16, BN=16)
    assert torch.equal(out.result()[:, :37], x.T)
    rest = out.result()[:, 37:]
    assert (rest.isnan() if dtype.is_floating_point else rest == 77).all()
