"""What a door costs over the kernels behind it: one layer of experts at one token, on the CPU, in microseconds.

    python benchmarks/x86_door.py [--calls N] [--json FILE]

The layer is small, so that what the kernels take does not hide the difference. `launcher` calls it with everything at
hand, `op` is `torch.ops.moecc.experts` on the same tensors, `transformers` the module under
`experts_implementation="moecc"`. They take turns call by call; overheads are medians of differences of neighbours.
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
from interleaved import load
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from x86_machine import machine

import moecc.integrations.transformers  # noqa: F401 - registers the name
from moecc.integrations.launchers import launcher_of

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2
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
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {}
    print("| mode | launcher us | op adds us | transformers adds us |\n| --- | --- | --- | --- |")
    for mode, context in MODES.items():
        with context():
            found[mode] = overheads(options.calls)
        print(f"| {mode} | {' | '.join(map(str, found[mode].values()))} |")
    print(load())
    if options.json:
        report = {"machine": machine(), "calls": options.calls, "us": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
