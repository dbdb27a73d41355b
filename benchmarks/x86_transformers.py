"""The experts of MoE layers through transformers on the CPU, bf16: `experts_implementation` moecc beside grouped_mm.

    python benchmarks/x86_transformers.py [--only WORDS] [--tokens N ...] [--rounds N] [--json FILE]

Sides take turns: moecc, grouped_mm, and grouped_mm compiled by inductor for each number of tokens. `forward` is
inference; `training` is forward and backward, with the gradients of hidden states, routing weights and both weights.
Shapes, random layers, routings and the check of results are those of x86_training.py. A ratio is the other side's time
over moecc's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from interleaved import compare, load
from transformers.integrations.moe import grouped_mm_experts_forward
from x86_machine import machine
from x86_training import SHAPES, TOKENS, Call, check, pool, random_experts, train

from moecc.codegen.config import LayerShape
from moecc.integrations.transformers import experts_forward

OTHERS = ("grouped_mm", "compiled")
Forward = Callable[[Call], torch.Tensor]


def forwards_of(module: torch.nn.Module) -> dict[str, Forward]:
    def grouped(call: Call) -> torch.Tensor:
        out: torch.Tensor = grouped_mm_experts_forward(module, call.x, call.ids, call.weights)
        return out

    def ours(call: Call) -> torch.Tensor:
        return experts_forward(module, call.x, call.ids, call.weights)

    compiled: Any = torch.compile(partial(grouped_mm_experts_forward, module), fullgraph=True, dynamic=False)
    return {
        "moecc": ours,
        "grouped_mm": grouped,
        "compiled": lambda call: compiled(call.x, call.ids, call.weights),
    }


def run_case(name: str, shape: LayerShape, module: Any, rounds: int) -> list[dict[str, Any]]:
    """Inference and training of one layer at one number of tokens."""
    torch.compiler.reset()
    calls, forwards = pool(shape), forwards_of(module)
    parameters = (module.gate_up_proj, module.down_proj)
    sides = {side: partial(train, forward, parameters) for side, forward in forwards.items()}
    difference = check(sides, calls[0])

    def infer(forward: Forward, call: Call) -> torch.Tensor:
        with torch.no_grad():
            return forward(call)

    kinds: dict[str, dict[str, Callable[[Call], Any]]] = {
        "forward": {side: partial(infer, forward) for side, forward in forwards.items()},
        "training": dict(sides),
    }
    return [
        {"shape": name, "tokens": shape.tokens, "kind": kind, "difference": difference}
        | timed(functions, calls, rounds)
        for kind, functions in kinds.items()
    ]


def timed(functions: dict[str, Callable[[Call], Any]], calls: list[Call], rounds: int) -> dict[str, Any]:
    def drawn(run: Callable[[Call], Any], offset: int, number: int) -> None:
        run(calls[(number + offset) % len(calls)])

    before = load()
    found = compare(
        {side: partial(drawn, run, 3 * number) for number, (side, run) in enumerate(functions.items())},
        rounds=rounds,
    )
    ratios = {other: found.ratios("moecc", other) for other in OTHERS}
    return {
        "ms": {side: round(1e3 * found.median(side), 2) for side in functions},
        "ratio": {other: [round(value, 3) for value in ratio] for other, ratio in ratios.items()},
        "load": [before, load()],
    }


def row(case: dict[str, Any]) -> str:
    ratios = ("{1:.2f} [{0:.2f}, {2:.2f}]".format(*ratio) for ratio in case["ratio"].values())
    cells = [f"{case['shape']}, {case['tokens']}", case["kind"], *map(str, case["ms"].values()), *ratios]
    return f"| {' | '.join((*cells, '; '.join(case['load'])))} |"


def means(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means of median ratios, by kind and other side."""
    return {
        f"{kind}, {other} / moecc": round(
            statistics.geometric_mean(c["ratio"][other][1] for c in cases if c["kind"] == kind), 3
        )
        for kind in ("forward", "training")
        for other in OTHERS
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
    cases: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        if options.only not in name:
            continue
        module = random_experts(shape)
        for tokens in options.tokens:
            sized = LayerShape(**{**vars(shape), "tokens": tokens})
            cases += run_case(name, sized, module, options.rounds)
            print(json.dumps(cases[-2:]), file=sys.stderr, flush=True)
    header = ["shape, tokens", "kind", "moecc ms", *(f"{other} ms" for other in OTHERS)]
    header += [*(f"{other} / moecc" for other in OTHERS), "load"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    print("\n".join(map(row, cases)))
    print("\nGeometric means: " + ", ".join(f"{name} {value}" for name, value in means(cases).items()))
    if options.json:
        report = {"machine": machine(), "rounds": options.rounds, "means": means(cases), "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
