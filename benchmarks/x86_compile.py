"""Seconds that kernels take to compile for x86, from a cold cache: the median of several, each in its own folder.

    python benchmarks/x86_compile.py [--repeats 5]

The first compilation of a process also loads LLVM and is not counted; nor is the C compiler's build of the launcher.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from interleaved import load

from moecc.autotune.defaults import default_configs
from moecc.codegen.config import LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.x86 import activate


@triton.jit
def sort_kernel(x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(x_ptr + at, tl.sort(tl.load(x_ptr + at)))


def layer(tokens: int) -> Callable[[], object]:
    """All kernels of one layer of Qwen3-30B's shape, with few experts to keep the weights small."""
    shape = LayerShape(tokens=tokens, hidden=2048, intermediate=768, experts=16, top_k=8)
    launcher = Launcher(freeze_layer(shape), {"x86": freeze_configs(default_configs(shape, "x86"))})
    x = torch.randn(tokens, 2048).bfloat16()
    weights: Mapping[str, torch.Tensor] = {
        "gate": torch.randn(16, 2048).bfloat16(),
        "gate_up": torch.randn(16, 1536, 2048).bfloat16(),
        "down": torch.randn(16, 2048, 768).bfloat16(),
    }
    return lambda: launcher.forward(x, weights)


def seconds_of_each(run: Callable[[], object]) -> dict[str, float]:
    """Kernel -> seconds from TTIR to loaded machine code, in a cache of its own."""
    found: dict[str, float] = {}

    def listen(*, src: Any, times: Any, **_: Any) -> None:
        lowered = sum(taken for _, taken in times.lowering_stages)
        found[src.name] = (times.ir_initialization + lowered) / 1e6

    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.listener = listen
        for kernel in list(_KERNELS):
            kernel.device_caches.clear()
        run()
    return found


_KERNELS: list[Any] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    activate()
    import moecc.codegen.launcher as launcher

    names = (
        "router_kernel",
        "plan_kernel",
        "scatter_kernel",
        "gate_up_kernel",
        "down_kernel",
        "combine_kernel",
    )
    _KERNELS.extend([sort_kernel, *(getattr(launcher, name) for name in names)])
    values = torch.randn(256)
    runs: dict[str, Callable[[], object]] = {
        "sort(256)": lambda: sort_kernel[(1,)](values, 256),
        "layer at 16 tokens": layer(16),
        "layer at 1100 tokens": layer(1100),
    }
    started = time.perf_counter()
    seconds_of_each(runs["sort(256)"])
    print(f"first of the process {time.perf_counter() - started:.2f} s; {load()}")
    for label, run in runs.items():
        rounds = [seconds_of_each(run) for _ in range(repeats)]
        for kernel in rounds[0]:
            taken = sorted(found[kernel] for found in rounds)
            print(
                f"{label:22} {kernel:16} {statistics.median(taken):.3f} s [{taken[0]:.3f} to {taken[-1]:.3f}]"
            )


if __name__ == "__main__":
    main()
