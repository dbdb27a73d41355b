# mypy: ignore-errors
"""Plain Triton kernels on the CPU beside torch (oneDNN in bf16 GEMMs), interleaved, and what a launch costs.

    python benchmarks/x86_ops.py [--only WORDS] [--rounds N] [--json FILE]

Both sides write into memory that they allocate alike. A ratio is torch's time over the kernel's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import triton
import triton.language as tl
from interleaved import compare, load
from torch.nn import functional
from x86_machine import PlainRead, machine

TOLERANCE = 1e-2  # relative, root mean square: rounding to bf16


@triton.jit
def gemm_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Sizes are multiples of their blocks. Programs walk GROUP_M row blocks before the next column block."""
    rows, columns = M // BLOCK_M, N // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    inside = tl.program_id(0) % (GROUP_M * columns)
    m = (group * GROUP_M + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """One row a program."""
    column = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * columns + column
    x = tl.load(x_ptr + offsets, column < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + offsets, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty), column < columns)


@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, out_ptr, columns, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program."""
    column = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * columns + column
    x = tl.load(x_ptr + offsets, column < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / columns + EPS)
    w = tl.load(w_ptr + column, column < columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (x * scale * w).to(out_ptr.dtype.element_ty), column < columns)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < count) + tl.load(y_ptr + i, i < count), i < count)


Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """work: how many FLOP or bytes one call is, of `unit` GFLOP/s or GB/s."""

    name: str
    make: Callable[[], tuple[Run, Run]]  # the kernel's side, torch's side
    work: int
    unit: str


def gemm(m: int, n: int, k: int, *, blocks: Sequence[tuple[int, int, int]], group_m: int) -> Case:
    """With the fastest of the blocks."""

    def make() -> tuple[Run, Run]:
        x, w = torch.randn(m, k).bfloat16(), (torch.randn(n, k) / k**0.5).bfloat16()

        def run(block: tuple[int, int, int]) -> torch.Tensor:
            out = torch.empty(m, n, dtype=x.dtype)
            gemm_kernel[(m // block[0] * (n // block[1]),)](x, w, out, m, n, k, *block, group_m)
            return out

        best = min(blocks, key=lambda block: _least_seconds(partial(run, block)))
        return partial(run, best), lambda: functional.linear(x, w)

    return Case(name=f"GEMM {m}x{n}x{k} bf16", make=make, work=2 * m * n * k, unit="GFLOP/s")


def _least_seconds(run: Run) -> float:
    run()  # compiles
    return min(timeit.repeat(run, number=1, repeat=5))


def softmax(rows: int, columns: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Run, Run]:
        x = torch.randn(rows, columns).to(dtype)
        outs = [torch.empty_like(x) for _ in range(2)]

        def run() -> torch.Tensor:
            softmax_kernel[(rows,)](x, outs[0], columns, triton.next_power_of_2(columns))
            return outs[0]

        return run, lambda: torch.softmax(x, dim=1, out=outs[1])

    work = 2 * rows * columns * dtype.itemsize
    return Case(name=f"softmax {rows}x{columns} {_short(dtype)}", make=make, work=work, unit="GB/s")


def rms_norm(rows: int, columns: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Run, Run]:
        x, w = torch.randn(rows, columns).to(dtype), torch.rand(columns).to(dtype)

        def run() -> torch.Tensor:
            out = torch.empty_like(x)
            rms_norm_kernel[(rows,)](x, w, out, columns, 1e-6, triton.next_power_of_2(columns))
            return out

        return run, lambda: functional.rms_norm(x, (columns,), w, 1e-6)

    work = 2 * rows * columns * dtype.itemsize
    return Case(name=f"RMSNorm {rows}x{columns} {_short(dtype)}", make=make, work=work, unit="GB/s")


def add(count: int, block: int) -> Case:
    def make() -> tuple[Run, Run]:
        x, y = torch.randn(count), torch.randn(count)
        outs = [torch.empty_like(x) for _ in range(2)]

        def run() -> torch.Tensor:
            add_kernel[(triton.cdiv(count, block),)](x, y, outs[0], count, block)
            return outs[0]

        return run, lambda: torch.add(x, y, out=outs[1])

    return Case(name=f"add {count} fp32", make=make, work=12 * count, unit="GB/s")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


CASES = [
    gemm(512, 2048, 2048, blocks=((128, 256, 2048), (128, 512, 512), (128, 1024, 512)), group_m=4),
    gemm(4096, 2048, 768, blocks=((512, 256, 256), (128, 512, 256), (128, 1024, 256)), group_m=8),
    softmax(4096, 1024, torch.float32),
    softmax(4096, 4096, torch.bfloat16),
    rms_norm(4096, 2048, torch.bfloat16),
    rms_norm(4096, 2048, torch.float32),
    add(1 << 16, 4096),
    add(1 << 24, 4096),
]


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    kernel, theirs = case.make()
    expected, found = theirs().float(), kernel().float()
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        raise SystemExit(f"{case.name}: differs from torch by {difference:.1e}")
    sides = {"kernel": lambda _: kernel(), "torch": lambda _: theirs(), "read": PlainRead(8)}
    result = compare(sides, rounds=rounds)
    low, median, high = result.ratios("kernel", "torch")
    return {
        "name": case.name,
        "load": load(),
        "ms": {name: round(1e3 * result.median(name), 4) for name in ("kernel", "torch")},
        "least ms": {name: round(1e3 * min(result.seconds[name]), 4) for name in ("kernel", "torch")},
        "ratio": {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)},
        case.unit: round(case.work / result.median("kernel") / 1e9, 1),
        "read GB/s": round(PlainRead.BYTES / result.median("read") / 1e9, 1),
    }


def launch_us() -> dict[str, float]:
    """Microseconds a launch of a kernel on 16 numbers takes: through Triton's `kernel[grid]`, of the compiled kernel
    alone, and torch's addition of as many. Medians of rounds of 200 launches."""
    x, y, out = (torch.zeros(16) for _ in range(3))
    compiled = add_kernel[(1,)](x, y, out, 16, 16)
    direct = compiled[(1, 1, 1)]
    sides = {
        "kernel[grid]": lambda: add_kernel[(1,)](x, y, out, 16, 16),
        "compiled kernel": lambda: direct(x, y, out, 16, 16),
        "torch.add": lambda: torch.add(x, y, out=out),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(15):
        for name, side in sides.items():
            started = time.perf_counter()
            for _ in range(200):
                side()
            found[name].append((time.perf_counter() - started) / 200 * 1e6)
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose names hold these words")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    launches = launch_us()
    print("us a launch: " + ", ".join(f"{name} {us}" for name, us in launches.items()), flush=True)
    cases = []
    for case in CASES:
        if options.only in case.name:
            cases.append(run_case(case, options.rounds))
            found = cases[-1]
            ratio = "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**found["ratio"])
            least = "{kernel:.3f} / {torch:.3f}".format(**found["least ms"])
            print(
                f"{case.name:<26} {found['ms']['kernel']:8.3f} ms, torch {found['ms']['torch']:8.3f} ms: {ratio}"
                f" (least {least})"
                f"  {found[case.unit]} {case.unit}, plain read {found['read GB/s']} GB/s; {found['load']}",
                flush=True,
            )
    if options.json:
        report = {"machine": machine(), "rounds": options.rounds, "launch us": launches, "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
