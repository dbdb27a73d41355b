"""Forward and backward of the experts of MoE layers on the CPU, bf16: moecc beside transformers, interleaved.

    python benchmarks/x86_training.py [--only WORDS] [--tokens N ...] [--rounds N] [--json FILE]

Both sides get hidden states, expert ids, weights and the gradient of the output, and return the output's sum and the
gradients of hidden states, routing weights and both weight tensors. `recompute` is moecc without saved
pre-activations. Routings are drawn from a pool, fresh for every call.

Memory is what torch's allocator hands out during one call, at its peak, without the gradients that are returned, and
what lies between forward and backward. Ratios of time are grouped_mm's over moecc's; of memory likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from interleaved import compare, load
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from x86_machine import machine

from moecc.autotune.training_defaults import training_configs
from moecc.codegen.config import LayerShape
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.training import TrainingLauncher

TOKENS = (16, 128, 1024)
SHAPES = {
    "Qwen3-30B": LayerShape(tokens=1, hidden=2048, intermediate=768, experts=128, top_k=8),
    "OLMoE": LayerShape(tokens=1, hidden=2048, intermediate=1024, experts=64, top_k=8),
    "Mixtral-like": LayerShape(tokens=1, hidden=2048, intermediate=7168, experts=8, top_k=2),
}
GRADIENTS = ("x", "topk_weights", "gate_up", "down")
# Root-mean-square difference of the sides' gradients, relative, that rounding to bf16 explains.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Call:
    """x and grad_out [tokens, hidden], ids int64 and weights bf16 [tokens, top_k]; x and weights want gradients."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    grad_out: torch.Tensor


Side = Callable[[Call], tuple[torch.Tensor, ...]]


class Experts(torch.autograd.Function):
    """The launcher as autograd sees it; `launcher` and `saves` stand first."""

    @staticmethod
    def forward(ctx: Any, launcher: TrainingLauncher, saves: bool, *tensors: torch.Tensor) -> torch.Tensor:
        x, ids, topk_weights, gate_up, down = tensors
        weights = {"gate_up": gate_up, "down": down}
        if saves:
            out, pre = launcher.experts_saving(x, ids, topk_weights, weights)
        else:
            out, pre = launcher.experts(x, ids, topk_weights, weights), None
        ctx.launcher = launcher
        ctx.save_for_backward(*tensors, pre)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, ids, topk_weights, gate_up, down, pre = ctx.saved_tensors
        weights = {"gate_up": gate_up, "down": down}
        found = ctx.launcher.experts_backward(
            grad_out, x, ids, topk_weights, weights, pre, wanted=frozenset(GRADIENTS)
        )
        return None, None, found["x"], None, found["topk_weights"], found["gate_up"], found["down"]


def random_experts(shape: LayerShape) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation="eager",
    )
    module = Qwen3MoeExperts(config).to(torch.bfloat16)
    for weights in module.parameters():
        torch.nn.init.normal_(weights, std=weights.shape[2] ** -0.5)
    return module


def pool(shape: LayerShape) -> list[Call]:
    found = []
    for _ in range(8):
        ids = torch.rand(shape.tokens, shape.experts).topk(shape.top_k, dim=1).indices
        weights = torch.rand(shape.tokens, shape.top_k)
        weights = (weights / weights.sum(dim=1, keepdim=True)).bfloat16().requires_grad_()
        x, grad_out = (torch.randn(shape.tokens, shape.hidden).bfloat16() for _ in range(2))
        found.append(Call(x.requires_grad_(), ids, weights, grad_out))
    return found


def sides_of(shape: LayerShape, module: Qwen3MoeExperts) -> dict[str, Side]:
    launcher = TrainingLauncher(freeze_layer(shape), {"x86": freeze_configs(training_configs(shape, "x86"))})
    parameters = (module.gate_up_proj, module.down_proj)

    def ours(saves: bool, call: Call) -> torch.Tensor:
        out: torch.Tensor = Experts.apply(launcher, saves, call.x, call.ids, call.weights, *parameters)
        return out

    def theirs(call: Call) -> torch.Tensor:
        out: torch.Tensor = grouped_mm_experts_forward(module, call.x, call.ids, call.weights)
        return out

    forwards = {"moecc": partial(ours, True), "recompute": partial(ours, False), "grouped_mm": theirs}
    return {name: partial(train, forward, parameters) for name, forward in forwards.items()}


def train(
    forward: Callable[[Call], torch.Tensor], parameters: Sequence[torch.Tensor], call: Call
) -> tuple[torch.Tensor, ...]:
    out = forward(call)
    return out, *torch.autograd.grad(out, (call.x, call.weights, *parameters), call.grad_out)


def check(sides: dict[str, Side], call: Call) -> float:
    """The largest relative difference from grouped_mm on the same call; raises where rounding does not explain it."""
    expected = [tensor.detach() for tensor in sides["grouped_mm"](call)]
    worst = 0.0
    for name in sides.keys() - {"grouped_mm"}:
        for ours, theirs in zip(sides[name](call), expected, strict=True):
            worst = max(worst, float((ours.detach() - theirs).float().norm() / theirs.float().norm()))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} differs from grouped_mm by {worst:.1e}")
    return worst


def peak_bytes(side: Side, call: Call) -> int:
    """What torch's allocator holds at the peak of one call beyond what it returns."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        returned = sum(tensor.nbytes for tensor in side(call))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - returned


def saved_bytes(side: Side, call: Call, given: Sequence[torch.Tensor]) -> int:
    """What lies between forward and backward, parameters and the call's own tensors aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side(call)
    return sum(found.values())


def run_case(name: str, shape: LayerShape, module: Qwen3MoeExperts, rounds: int) -> dict[str, Any]:
    calls, sides = pool(shape), sides_of(shape, module)
    difference = check(sides, calls[0])
    given = (*module.parameters(), calls[0].x, calls[0].ids, calls[0].weights)
    peak = {side: peak_bytes(run, calls[0]) for side, run in sides.items()}
    saved = {side: saved_bytes(run, calls[0], given) for side, run in sides.items()}

    def drawn(run: Side, offset: int, number: int) -> None:
        run(calls[(number + offset) % len(calls)])

    before = load()
    timed = {side: partial(drawn, run, 3 * number) for number, (side, run) in enumerate(sides.items())}
    found = compare(timed, rounds=rounds)
    q1, median, q3 = found.ratios("moecc", "grouped_mm")
    return {
        "shape": name,
        "tokens": shape.tokens,
        "ms": {side: round(1e3 * found.median(side), 2) for side in sides},
        "ratio": {"q1": round(q1, 3), "median": round(median, 3), "q3": round(q3, 3)},
        "recompute ratio": round(found.ratios("recompute", "grouped_mm")[1], 3),
        "peak MB": {side: round(size / 1e6, 2) for side, size in peak.items()},
        "saved MB": {side: round(size / 1e6, 2) for side, size in saved.items()},
        "difference": difference,
        "load": [before, load()],
    }


def row(case: dict[str, Any]) -> str:
    ratio = "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**case["ratio"])
    cells = [
        f"{case['shape']}, {case['tokens']}",
        *(f"{ms:.1f}" for ms in case["ms"].values()),
        ratio,
        f"{case['recompute ratio']:.2f}",
        *(f"{size:.1f}" for size in case["peak MB"].values()),
        *(f"{size:.1f}" for size in case["saved MB"].values()),
        "; ".join(case["load"]),
    ]
    return f"| {' | '.join(cells)} |"


def header(sides: Sequence[str]) -> str:
    names = [
        "shape, tokens",
        *(f"{side} ms" for side in sides),
        "grouped_mm / moecc",
        "grouped_mm / recompute",
        *(f"{side} peak MB" for side in sides),
        *(f"{side} saved MB" for side in sides),
        "load",
    ]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="shapes whose names hold these words")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    cases = []
    for name, shape in SHAPES.items():
        if options.only not in name:
            continue
        module = random_experts(shape)
        for tokens in options.tokens:
            sized = LayerShape(**{**vars(shape), "tokens": tokens})
            cases.append(run_case(name, sized, module, options.rounds))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    print("\n".join((header(list(cases[0]["ms"])), *map(row, cases))))
    means = {
        "grouped_mm / moecc": statistics.geometric_mean(case["ratio"]["median"] for case in cases),
        "grouped_mm / recompute": statistics.geometric_mean(case["recompute ratio"] for case in cases),
    }
    print("\nGeometric means: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    if options.json:
        report = {"machine": machine(), "rounds": options.rounds, "means": means, "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
