"""Placement on real routing: what moecc reaches, beside what it should, each with the seconds it took.

    python benchmarks/placement.py [--only WORDS] [--workers N]

The traces are those of the shared folder (MOECC_SHARED, default ../shared beside the checkout); they are split by
sequences, one half to solve on and one to score. Cases without their data are skipped.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement import Placement, PlacementProblem, evaluate, evaluate_all, solve
from moecc.solvers.placement.fast import fast_balance
from moecc.solvers.placement.margin import solve_unseen
from moecc.solvers.routing import Routing, assumed_routing

SHARED = Path(os.environ.get("MOECC_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "routing"
Figures = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """run(workers) yields what was reached, in words, and the seconds that took."""

    name: str
    target: str
    run: Callable[[int], Iterator[Figures]]


def traces() -> tuple[tuple[Routing, ...], list[Routing]]:
    """Halves of the DeepSeek-V2-Lite traces, to solve on and to score."""
    halves = []
    for name in ("intent", "summary"):
        data = np.load(SHARED / f"deepseek_v2_lite_{name}.npz")
        halves.append(Routing(name, data["topk_ids"], 64, data["sequence_ids"]).split())
    return tuple(fit for fit, _ in halves), [score for _, score in halves]


def dumps() -> list[NDArray[np.float64]]:
    """Two SGLang recorder dumps: counts [58, 256]."""
    import torch

    found = []
    for name in ("1k1k", "1k8k"):
        dump = torch.load(SHARED / f"sglang_expert_distribution_256e_fp4_{name}.pt", weights_only=True)
        found.append(np.asarray(dump["logical_count"].double().numpy().reshape(61, 256)[3:], np.float64))
    return found


def problem_of(workloads: tuple[Routing, ...], slots: int, **options: object) -> PlacementProblem:
    return PlacementProblem(
        workloads=workloads,
        devices=8,
        devices_per_node=8,
        slots_per_device=slots // 8,
        **options,  # type: ignore[arg-type]
    )


def load_on_traces(slots: int) -> Callable[[int], Iterator[Figures]]:
    def run(workers: int) -> Iterator[Figures]:
        training, held_out = traces()
        problem = problem_of(training, slots, objective="load", time_limit_s=5, workers=workers)
        started = time.monotonic()
        found = solve(problem)
        seconds = time.monotonic() - started
        seen = found.certificate.objective
        unseen = evaluate_all(found.placement, held_out, "home").mean.imbalance
        yield f"{unseen:.4f} held out ({seen:.4f} in sample, bound {found.certificate.bound:.4f})", seconds

    return run


def fan_out_on_traces(balance: str, cap: float) -> Callable[[int], Iterator[Figures]]:
    def run(workers: int) -> Iterator[Figures]:
        training, held_out = traces()
        problem = problem_of(
            training, 64, balance=balance, max_imbalance=cap, time_limit_s=30, workers=workers
        )
        started = time.monotonic()
        found = solve_unseen(problem)
        seconds = time.monotonic() - started
        unseen, margin = evaluate_all(found.placement, held_out, "home"), found.certificate.margin
        assert margin is not None
        imbalance = unseen.pooled_imbalance if balance == "pooled" else unseen.mean.imbalance
        yield (
            f"{unseen.mean.fan_out:.3f} at {imbalance:.4f} held out (cap {margin.cap:.4f}, gap {margin.gap:.4f})",
            seconds,
        )

    return run


def pairs_on_traces(workers: int) -> Iterator[Figures]:
    training, held_out = traces()
    problem = problem_of(
        training, 64, execution="migrate", balance="pooled", max_imbalance=1.10, time_limit_s=30
    )
    started = time.monotonic()
    found = solve_unseen(problem)
    seconds = time.monotonic() - started
    unseen = evaluate_all(found.placement, held_out, "migrate")
    yield (
        f"{unseen.mean.same_device_pairs:.4f} at {unseen.pooled_imbalance:.4f} held out, hops {unseen.mean.hops:.3f}",
        seconds,
    )


def online(workers: int) -> Iterator[Figures]:
    first, _ = dumps()
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        placement = fast_balance(first, 32, 9, devices_per_node=8)
        seconds.append(time.monotonic() - started)
    yield f"{balancedness(placement, first):.4f}", statistics.median(seconds)


def online_for_both(workers: int) -> Iterator[Figures]:
    counts = np.stack(dumps())
    started = time.monotonic()
    placement = fast_balance(counts, 32, 9, devices_per_node=8)
    seconds = time.monotonic() - started
    yield f"{min(balancedness(placement, load) for load in counts):.4f}", seconds


def balancedness(placement: Placement, loads: NDArray[np.float64]) -> float:
    """Mean device load / max device load, mean over layers."""
    ratios = []
    for row, load in zip(placement.physical_to_logical, loads, strict=True):
        devices = (
            (load / np.bincount(row, minlength=len(load)))[row].reshape(placement.devices, -1).sum(axis=1)
        )
        ratios.append(devices.mean() / devices.max())
    return float(np.mean(ratios))


def load_of_94_layers(workers: int) -> Iterator[Figures]:
    for alpha in (0.3, 0.6, 1.0):
        routing = assumed_routing("zipf", layers=94, experts=128, top_k=8, alpha=alpha, tokens=4096)
        started = time.monotonic()
        found = solve(problem_of((routing,), 128, objective="load", time_limit_s=55, workers=workers))
        seconds = time.monotonic() - started
        gap = found.certificate.gap
        assert gap is not None
        yield f"zipf {alpha}: {found.certificate.objective:.5f}, gap {gap:.4%}", seconds


def many_devices(workers: int) -> Iterator[Figures]:
    training, held_out = co_activated().split()
    problem = PlacementProblem(
        workloads=(training,),
        devices=320,
        devices_per_node=8,
        slots_per_device=1,
        time_limit_s=60,
        workers=workers,
    )
    started = time.monotonic()
    found = solve(problem).placement
    seconds = time.monotonic() - started
    greedy = fast_balance(training.loads(), 320, 1, devices_per_node=8)
    ours, eplb = (evaluate(placement, held_out, "home").node_fan_out for placement in (found, greedy))
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    yield f"node fan-out {ours:.3f}, balanced alone {eplb:.3f}, held out; {peak / 2**20:.2f} GiB", seconds


def co_activated(topics: int = 24, sequence: int = 64, tokens: int = 4096) -> Routing:
    """58 layers x 256 experts, top-8: every sequence has a topic, and a topic has experts it prefers in each layer."""
    rng = np.random.default_rng(0)
    topic = np.repeat(rng.integers(0, topics, tokens // sequence), sequence)
    ids = np.empty((tokens, 58, 8), np.int16)
    for layer in range(58):
        logits = rng.normal(0, 0.7, 256) + rng.normal(0, 1.2, (topics, 256))
        keys = logits[topic] + rng.gumbel(size=(tokens, 256))
        ids[:, layer] = np.argpartition(-keys, 7, axis=1)[:, :8]
    return Routing("co-activated", ids, 256, np.arange(tokens, dtype=np.int32) // sequence)


CASES = [
    Case(name="V2-Lite, 8 devices, 64 slots: load", target="<= 1.07 in 5 s", run=load_on_traces(64)),
    Case(name="V2-Lite, 8 devices, 72 slots: load", target="<= 1.06 in 5 s", run=load_on_traces(72)),
    Case(name="fan-out at pooled 1.10", target="<= 3.5 in 30 s", run=fan_out_on_traces("pooled", 1.10)),
    Case(
        name="fan-out at per-workload 1.17", target="<= 3.90 in 30 s", run=fan_out_on_traces("workload", 1.17)
    ),
    Case(name="migrate: pairs on one device at 1.10", target=">= 0.28 in 30 s", run=pairs_on_traces),
    Case(name="58 x 256, 288 slots, 32 devices: online", target=">= 0.997 in 0.2 s", run=online),
    Case(name="58 x 256, both dumps: online, the worse", target=">= 0.992", run=online_for_both),
    Case(name="94 x 128, 8 devices: load", target="gap <= 0.5% in 60 s", run=load_of_94_layers),
    Case(name="58 x 256, 320 devices: traffic", target="below balanced in 60 s", run=many_devices),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="run the cases whose names hold these words")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {options.workers} workers")
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            for reached, seconds in case.run(options.workers):
                print(f"{case.name:<42} {case.target:<24} {seconds:7.2f} s  {reached}", flush=True)
        except FileNotFoundError as error:
            print(f"{case.name:<42} skipped: {error.filename} is not here (MOECC_SHARED)", flush=True)


if __name__ == "__main__":
    main()
