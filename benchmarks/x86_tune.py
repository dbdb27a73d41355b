"""Tuning on the CPU beside exhaustive search of the same space, bf16: how far from the best are 32 configs, and none?

    python benchmarks/x86_tune.py [--only WORDS] [--tokens N ...] [--trials N] [--json FILE]

Exhaustive search times every config of `kernel_space`: for each row tile all of gate_up with the default's down, and
all of down, since their times add. Of each row tile the best two make one config; these, with the router and combine
that tuning found, run against the tuned and the default config in rounds that alternate. A distance is the median of
ratios within rounds. Kernels of one shape serve all its token counts, so the first is slow.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interleaved import load
from x86_machine import machine

from moecc.autotune.cache_settings import CacheSettings
from moecc.autotune.choose import environment_for, open_cache
from moecc.autotune.defaults import default_configs
from moecc.autotune.device import WorkerDevice
from moecc.autotune.layer_configs import UNIFORM, configs_of
from moecc.autotune.race import Runner, quartiles, race
from moecc.autotune.space import kernel_space
from moecc.autotune.tune import COMPILE_TIMEOUT_S, Budget, Tuning
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.targets import find_target

TOKENS = (1, 16, 128, 1024)
SHAPES = {
    "Qwen3-30B": LayerShape(tokens=1, hidden=2048, intermediate=768, experts=128, top_k=8),
    "OLMoE": LayerShape(tokens=1, hidden=2048, intermediate=1024, experts=64, top_k=8),
}
TARGET = find_target("x86")
FINAL_ROUNDS = 21


def tuned(device: WorkerDevice, trials: int) -> tuple[KernelConfigs, int]:
    """The config that tuning chooses without any cache, and how many it measured."""
    environment = environment_for("x86")
    if isinstance(environment, str):
        raise SystemExit(environment)
    cache, space = open_cache("x86", environment, CacheSettings(folder=Path(tempfile.mkdtemp())))
    tuning = Tuning(
        cache=cache,
        key=space.key(device.shape, UNIFORM),
        shape=device.shape,
        target=TARGET,
        default=device.default,
        device=device,
        budget=Budget(trials=trials),
        tools={},
    )
    record = tuning.run()
    if record is None:
        raise SystemExit("nothing was measured")
    return configs_of(record.best.config), tuning.measured - 1


def exhaustive(device: WorkerDevice) -> tuple[list[KernelConfigs], int]:
    """For each row tile the config of the best gate_up and the best down, and the size of the space."""
    candidates = list(kernel_space(device.default, device.shape, TARGET))
    problems = device.prepare(candidates, COMPILE_TIMEOUT_S)
    right = [configs for configs, problem in zip(candidates, problems, strict=True) if not problem]
    runners: list[Runner] = []
    for heat in race(device, device.default, right):
        runners = heat
    measured = [runner for runner in runners if runner.ratios]
    return [_composed(measured, rows) for rows in sorted({_rows(r) for r in measured})], len(candidates)


def _rows(runner: Runner) -> int:
    return runner.configs.gate_up.block_m


def _composed(measured: Sequence[Runner], rows: int) -> KernelConfigs:
    """Runners differ from the default in one of the two GEMMs, but for the row tile."""
    of_tile = sorted((runner for runner in measured if _rows(runner) == rows), key=lambda r: r.ratio)
    default = of_tile[0].configs
    found = {name: [getattr(r.configs, name) for r in of_tile] for name in ("gate_up", "down")}
    common = {name: max(set(gemms), key=gemms.count) for name, gemms in found.items()}
    best = {
        name: next((g for g, o in zip(found[name], found[other], strict=True) if o == common[other]), None)
        for name, other in (("gate_up", "down"), ("down", "gate_up"))
    }
    return replace(default, gate_up=best["gate_up"] or default.gate_up, down=best["down"] or default.down)


def final(device: WorkerDevice, sides: Sequence[KernelConfigs]) -> list[tuple[float, float, float]]:
    """Quartiles of each side's time over the default's in the same round, sides starting in turn."""
    ratios: list[list[float]] = [[] for _ in sides]
    for number in range(FINAL_ROUNDS):
        base_us = device.time_us(device.default, number)
        for place in range(len(sides)):
            side = (place + number) % len(sides)
            ratios[side].append(device.time_us(sides[side], number) / base_us)
    return [quartiles(side) for side in ratios]


def run_case(name: str, tokens: int, trials: int, kernels: Path) -> dict[str, Any]:
    shape = replace(SHAPES[name], tokens=tokens)
    default = default_configs(shape, "x86")
    before, began = load(), time.monotonic()
    with WorkerDevice(shape=shape, target="x86", default=default, kernels=kernels) as device:
        chosen, measured = tuned(device, trials)
        tuned_s = time.monotonic() - began
        composed, size = exhaustive(device)
        grafted = [replace(one, router=chosen.router, combine=chosen.combine) for one in composed]
        problems = device.prepare(grafted, COMPILE_TIMEOUT_S)
        grafted = [one for one, problem in zip(grafted, problems, strict=True) if not problem]
        mine, *theirs = final(device, [chosen, *grafted])
        base_us = device.time_us(default, 0)
    best = min(median for _, median, _ in (mine, *theirs))
    return {
        "shape": name,
        "tokens": tokens,
        "space": size,
        "measured": measured,
        "default us": round(base_us, 1),
        "tuned over best": round(mine[1] / best, 3),
        "tuned quartiles over default": [round(mine[0], 3), round(mine[2], 3)],
        "default over best": round(1 / best, 3),
        "tuning s": round(tuned_s, 1),
        "all s": round(time.monotonic() - began, 1),
        "load": [before, load()],
        "tuned": str(chosen.gate_up) + str(chosen.down),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="shapes whose names hold these words")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    cases = []
    for name in SHAPES:
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as kernels:
            for tokens in options.tokens:
                cases.append(run_case(name, tokens, options.trials, Path(kernels)))
                print(json.dumps(cases[-1]), flush=True)
    near = sum(case["tuned over best"] <= 1.05 for case in cases)
    defaults = sum(case["default over best"] <= 1.25 for case in cases)
    print(f"tuned within 5 % of the best: {near} of {len(cases)}; default within 25 %: {defaults}")
    if options.json:
        report = {"machine": machine(), "trials": options.trials, "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
