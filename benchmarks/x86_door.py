"""What doors cost, on the CPU: one layer of experts at one token, in microseconds, and a whole layer with its router.

    python benchmarks/x86_door.py [--calls N] [--rounds N] [--json FILE]

The layer is small, so that what the kernels take does not hide the difference. `launcher` calls it with everything at
hand, `op` is `torch.ops.moecc.experts` on the same tensors, `transformers` the module under
`experts_implementation="moecc"`. They take turns call by call; overheads are medians of differences of neighbours.

The whole layer is one of Qwen3-30B in bf16: `lifted`, its router in the same op, beside the op of the experts with the
router in torch, eager or compiled by inductor. They take turns in every round; ratios are medians with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from interleaved import Comparison, compare, load
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from x86_machine import machine

import moecc.integrations.block_op
import moecc.integrations.transformers  # noqa: F401 - registers the name
from moecc.codegen.config import LayerShape
from moecc.integrations.block_ir import fused_text
from moecc.integrations.launchers import launcher_of
from moecc.ir.semantics import Router

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2
LAYER = LayerShape(
    tokens=1, hidden=2048, intermediate=768, experts=128, top_k=8, router=Router(normalize=True)
)
LAYER_TOKENS = (1, 16)
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "enable_grad": torch.enable_grad}


def sides() -> dict[str, Callable[[], torch.Tensor]]:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="moecc",
    )
    module = Qwen3MoeExperts(config).requires_grad_(False)
    for weights in module.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    gate_up, down = module.gate_up_proj, module.down_proj
    x, (topk_weights, ids) = torch.randn(1, HIDDEN), torch.rand(1, EXPERTS).topk(TOP_K)
    switches = ("silu_glu", 1.702, 7.0, False, False)
    launcher = launcher_of(gate_up.shape, TOP_K, 1, torch.float32, False, *switches)
    tensors = {"gate_up": gate_up, "down": down}
    op = torch.ops.moecc.experts
    return {
        "launcher": lambda: launcher.experts(x, ids, topk_weights, tensors),
        "op": lambda: op(x, ids, topk_weights, gate_up, down, None, None, *switches),
        "transformers": lambda: module(x, ids, topk_weights),
    }


def layer_sides(tokens: int) -> dict[str, Callable[[int], torch.Tensor]]:
    """The layer LAYER on tokens drawn anew for every call, so that other experts are chosen."""
    hidden, inner, experts, top_k = LAYER.hidden, LAYER.intermediate, LAYER.experts, LAYER.top_k
    gate_up = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16).normal_(std=hidden**-0.5)
    down = torch.empty(experts, hidden, inner, dtype=torch.bfloat16).normal_(std=inner**-0.5)
    gate = torch.randn(experts, hidden, dtype=torch.bfloat16)
    draws = torch.randn(32, tokens, hidden, dtype=torch.bfloat16)
    ir, switches = fused_text(LAYER), ("silu_glu", 1.702, 7.0, False, False)

    def lifted(call: int) -> torch.Tensor:
        weights = (gate, None, None, gate_up, down, None, None)
        return torch.ops.moecc.moe_block(draws[call % len(draws)], *weights, ir)

    def with_router(x: torch.Tensor) -> torch.Tensor:
        scores = functional.softmax(functional.linear(x, gate), dtype=torch.float32, dim=-1)
        weights, ids = torch.topk(scores, top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        return torch.ops.moecc.experts(x, ids, weights, gate_up, down, None, None, *switches)

    compiled = torch.compile(with_router)
    return {
        "lifted": lifted,
        "eager router": lambda call: with_router(draws[call % len(draws)]),
        "compiled router": lambda call: compiled(draws[call % len(draws)]),
    }


def layer_times(rounds: int) -> dict[int, Comparison]:
    """By the number of tokens."""
    found = {}
    with torch.no_grad():
        for tokens in LAYER_TOKENS:
            sides = layer_sides(tokens)
            for side in sides.values():
                side(0)
            found[tokens] = compare(sides, rounds=rounds)
    return found


def print_layers(found: dict[int, Comparison]) -> None:
    print("\n| tokens | lifted ms | eager router ms | compiled router ms | x eager | x compiled |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tokens, times in found.items():
        medians = " | ".join(f"{times.median(side) * 1e3:.2f}" for side in times.seconds)
        ratios = (times.ratios("lifted", side) for side in ("eager router", "compiled router"))
        cells = " | ".join(f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios)
        print(f"| {tokens} | {medians} | {cells} |")


def microseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


def overheads(calls: int) -> dict[str, float]:
    """Medians: what a call of the launcher takes, and what the others take more."""
    functions = sides()
    for function in functions.values():
        function()
    rounds = [{name: microseconds(function) for name, function in functions.items()} for _ in range(calls)]
    found = {"launcher": statistics.median(taken["launcher"] for taken in rounds)}
    for name in ("op", "transformers"):
        found[name] = statistics.median(taken[name] - taken["launcher"] for taken in rounds)
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=40, help="of the whole layer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {}
    print("| mode | launcher us | op adds us | transformers adds us |\n| --- | --- | --- | --- |")
    for mode, context in MODES.items():
        with context():
            found[mode] = overheads(options.calls)
        print(f"| {mode} | {' | '.join(map(str, found[mode].values()))} |")
    layers = layer_times(options.rounds)
    print_layers(layers)
    print(load())
    if options.json:
        report = {"machine": machine(), "calls": options.calls, "us": found}
        report["layer_s"] = {tokens: times.seconds for tokens, times in layers.items()}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
