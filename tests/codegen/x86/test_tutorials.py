"""Kernels as people write them, run on CPU tensors at every level, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from moecc.codegen.x86 import activated
from moecc.codegen.x86.features import supported_levels

sys.path.append(str(Path(__file__).parent))
import tutorial_kernels as kernels

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")
NAN = float("nan")


@pytest.fixture(params=supported_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with activated(request.param):
        yield


@pytest.mark.parametrize("size", [1, 98, 1024, 98432])
def test_vectors_are_added(size: int) -> None:
    x, y = torch.randn(2, size)
    out = torch.full((size + 64,), NAN)
    kernels.add_vectors[(triton.cdiv(size, 1024),)](x, y, out, size, 1024)
    assert torch.equal(out[:size], x + y)
    assert out[size:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (23, 781), (5, 1024)])
def test_rows_are_made_softmax(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = (4 * torch.randn(rows, columns + 3)).to(dtype)
    x[0, 0] = -float("inf") if columns > 1 else 1.0
    out = torch.full((rows, columns), NAN, dtype=dtype)
    block = triton.next_power_of_2(columns)
    kernels.softmax_rows[(3,)](x, out, rows, columns, columns + 3, columns, block)
    exact = x[:, :columns].double().softmax(-1)
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (100, 70, 130), (1, 33, 257), (257, 129, 31)])
@pytest.mark.parametrize("layout", ["kn", "nk", "mk transposed"])
def test_matrices_are_multiplied(m: int, n: int, k: int, dtype: torch.dtype, layout: str) -> None:
    a = torch.randn(k, m).to(dtype).T if layout == "mk transposed" else torch.randn(m, k).to(dtype)
    b = torch.randn(n, k).to(dtype).T if layout == "nk" else torch.randn(k, n).to(dtype)
    c = torch.full((m, n), NAN)
    grid = (triton.cdiv(m, 32) * triton.cdiv(n, 32),)
    strides = (*a.stride(), *b.stride(), *c.stride())
    kernels.multiply_matrices[grid](a, b, c, m, n, k, *strides, 32, 32, 64, 4, "leaky_relu")
    exact = torch.nn.functional.leaky_relu(a.double() @ b.double(), 0.01)
    torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-4)


def test_what_is_dropped_depends_on_the_seed_alone() -> None:
    size, p = 4099, 0.3
    x = torch.randn(size)

    def dropped(seed: int, block: int) -> torch.Tensor:
        out = torch.full((size,), NAN)
        kernels.drop_out[(triton.cdiv(size, block),)](x, out, size, p, seed, block)
        return out

    out = dropped(123, 1024)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - p))
    assert abs(kept.double().mean().item() - (1 - p)) < 0.03
    assert torch.equal(out, dropped(123, 64))
    assert not torch.equal(kept, dropped(512, 1024) != 0)


@pytest.mark.parametrize("size", [64, 1000])
def test_layers_are_normalised_forward_and_backward(size: int) -> None:
    rows, groups, block = 37, 4, triton.next_power_of_2(size)
    x, dy = torch.randn(2, rows, size)
    w, b = torch.randn(2, size)
    y, dx = torch.full((2, rows, size), NAN)
    mean, rstd = torch.full((2, rows), NAN)
    kernels.layer_norm[(rows,)](x, y, w, b, mean, rstd, size, size, 1e-5, 128)
    dw, db = torch.full((2, groups, size), NAN)
    locks = torch.zeros(2 * groups, dtype=torch.int32)
    kernels.layer_norm_backward[(rows,)](dx, dy, dw, db, x, w, mean, rstd, locks, size, size, groups, block)
    exact = [tensor.double().requires_grad_() for tensor in (x, w, b)]
    result = torch.nn.functional.layer_norm(exact[0], (size,), exact[1], exact[2], 1e-5)
    result.backward(dy.double())
    for ours, theirs in zip(
        (y, dx, dw.sum(0), db.sum(0)), (result.detach(), *(tensor.grad for tensor in exact)), strict=True
    ):
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("size", "dim"), [(128, 64), (75, 32), (33, 128)])
def test_attention(size: int, dim: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, size, dim).to(dtype)
    out = torch.full((2, size, dim), NAN, dtype=dtype)
    grid = (triton.cdiv(size, 32), 2)
    kernels.attend[grid](q, k, v, out, size, dim**-0.5, causal, 32, 16, dim)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_groups_of_products() -> None:
    sizes = [(64, 48, 32), (33, 70, 100), (1, 16, 16), (128, 128, 96)]
    a = [torch.randn(m, k).half() for m, _, k in sizes]
    b = [torch.randn(k, n).half() for _, n, k in sizes]
    c = [torch.full((m, n), NAN).half() for m, n, _ in sizes]
    addresses = [torch.tensor([tensor.data_ptr() for tensor in group]) for group in (a, b, c)]
    table = torch.tensor(sizes, dtype=torch.int32)
    kernels.multiply_groups[(5,)](*addresses, table, len(sizes), 5, 32, 32, 32)
    for left, right, ours in zip(a, b, c, strict=True):
        torch.testing.assert_close(ours.double(), left.double() @ right.double(), rtol=2e-3, atol=2e-2)
