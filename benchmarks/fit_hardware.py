"""Fit the constants of `moecc/hardware/data` to published measurements and print their held-out errors.

    MOECC_SHARED=../shared python benchmarks/fit_hardware.py [device ...]

The measurements (ai-dynamo/aiconfigurator at 095f58a5, Apache-2.0; and for x86 the project's own) are read from
`$MOECC_SHARED/data`; nothing of them is copied. Each model is fitted by Nelder-Mead on the mean absolute log error
of a fixed subsample, through the same `latency_us` that the compiler calls. The held-out error is the median of
|predicted / measured - 1| over rows whose whole group (a layer shape, a GEMM's n and k, a message size) was left
out of the fit, in four folds. At the end a device is left out: its routed-expert layers are predicted from its
datasheet and the efficiencies of another.
"""

from __future__ import annotations

import csv
import gzip
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecc.hardware import (
    AllGather,
    AllToAll,
    Cluster,
    Compute,
    DeviceSpec,
    ExpertLayer,
    Roofline,
    Work,
    latency_us,
    load_device,
    uniform_distinct,
)

FOLDS = 4
SAMPLE = 300
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One measurement; rows of one `group` are left out together."""

    group: tuple[object, ...]
    work: Work
    nodes: int
    devices_per_node: int
    measured_us: float


@dataclass(frozen=True)
class Family:
    """One latency model: its parameters in and out of a device, and the rows it is fitted to."""

    model: str
    names: tuple[str, ...]
    start: tuple[float, ...]
    apply: Callable[[DeviceSpec, Sequence[float]], DeviceSpec]
    rows: list[Row]


def predict(device: DeviceSpec, rows: list[Row]) -> Array:
    clusters = {
        key: Cluster(device=device, nodes=key[0], devices_per_node=key[1])
        for key in {(row.nodes, row.devices_per_node) for row in rows}
    }
    return np.array([latency_us(row.work, clusters[row.nodes, row.devices_per_node]) for row in rows])


def relative_errors(device: DeviceSpec, rows: list[Row]) -> Array:
    errors: Array = np.abs(predict(device, rows) / np.array([row.measured_us for row in rows]) - 1.0)
    return errors


def fit(device: DeviceSpec, family: Family, rows: list[Row]) -> tuple[float, ...]:
    """Parameters that minimise the mean |log(predicted / measured)| on a subsample of `rows`."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:SAMPLE]
    sample = [rows[i] for i in chosen]
    log_measured = np.log([row.measured_us for row in sample])

    def loss(x: Array) -> float:
        fitted = family.apply(device, list(np.exp(x)))
        return float(np.abs(np.log(predict(fitted, sample)) - log_measured).mean())

    return tuple(float(value) for value in np.exp(nelder_mead(loss, np.log(family.start))))


def nelder_mead(
    loss: Callable[[Array], float], start: Array, *, step: float = 0.2, rounds: int = 250
) -> Array:
    """Minimise `loss` from `start` (Nelder and Mead 1965, standard coefficients, shrink towards the best)."""
    points = [start, *(start + step * row for row in np.eye(len(start)))]
    values = [loss(point) for point in points]
    for _ in range(rounds):
        order = np.argsort(values, kind="stable")
        points, values = [points[i] for i in order], [values[i] for i in order]
        centre = np.mean(points[:-1], axis=0)
        tried = [2 * centre - points[-1]]
        tried_values = [loss(tried[0])]
        if tried_values[0] < values[0]:
            tried.append(3 * centre - 2 * points[-1])
        elif tried_values[0] >= values[-2]:
            tried.append((centre + points[-1]) / 2)
        tried_values += [loss(point) for point in tried[1:]]
        best = int(np.argmin(tried_values))
        if tried_values[best] < values[-1]:
            points[-1], values[-1] = tried[best], tried_values[best]
        else:
            points = [points[0], *((points[0] + point) / 2 for point in points[1:])]
            values = [values[0], *(loss(point) for point in points[1:])]
    return points[int(np.argmin(values))]


def held_out_errors(device: DeviceSpec, family: Family) -> Array:
    """|predicted / measured - 1| of every row, by constants fitted without its group."""
    groups = sorted({row.group for row in family.rows}, key=repr)
    shuffled = np.random.default_rng(1).permutation(len(groups))
    fold_of = {groups[index]: place % FOLDS for place, index in enumerate(shuffled)}
    errors = []
    for fold in range(FOLDS):
        inside = [row for row in family.rows if fold_of[row.group] != fold]
        outside = [row for row in family.rows if fold_of[row.group] == fold]
        fitted = family.apply(device, fit(device, family, inside))
        errors.append(relative_errors(fitted, outside))
    return np.concatenate(errors)


def read(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from csv.DictReader(file)


def dense_rows(data: Path, system: str, dtype: str) -> list[Row]:
    """GEMMs with n and k of at least 512: those of a language model; a group is one (n, k)."""
    size = {"bfloat16": 2, "fp8": 1}[dtype]
    rows = []
    for r in read(data / "perf/gemm_latency.csv.gz"):
        m, n, k = int(r["m"]), int(r["n"]), int(r["k"])
        if r["system"] == system and r["gemm_dtype"] == dtype and min(n, k) >= 512:
            quantised = (
                3.0 * m * k if dtype == "fp8" else 0.0
            )  # vLLM reads bf16 rows and writes them as fp8 first
            work = Compute(
                flops=2.0 * m * n * k,
                bytes=size * (m * k + n * k) + 2.0 * m * n + quantised,
                dtype=dtype,
                launches=2 if dtype == "fp8" else 1,
            )
            rows.append(Row((n, k), work, 1, 1, float(r["latency_ms"]) * 1e3))
    return rows


def expert_rows(data: Path, system: str, kernel: str, dtype: str, *, ep: bool) -> list[Row]:
    """Whole expert layers under balanced routing; a group is one model shape.

    Under expert parallelism vLLM's kernels write the rows of absent experts too (as zeros): `buffer_rows`.
    Layers without a gate (top-22 ones) are left out: their kernel source does not say which they are.
    """
    rows = []
    for r in read(data / "perf/moe_layer_latency.csv.gz"):
        wanted = (r["system"], r["moe_dtype"], r["distribution"]) == (system, dtype, "balanced")
        if (
            not wanted
            or kernel not in r["kernel_source"]
            or r["topk"] == "22"
            or (r["moe_ep_size"] != "1" and not ep)
        ):
            continue
        keys = (
            "hidden_size",
            "inter_size",
            "topk",
            "num_experts",
            "moe_tp_size",
            "moe_ep_size",
            "num_tokens",
        )
        hidden, inter, top_k, experts, tp_size, ep_size, tokens = (int(r[key]) for key in keys)
        local = max(1.0, tokens * top_k / ep_size)
        work = ExpertLayer(
            tokens=tokens,
            rows=local,
            experts_active=min(experts / ep_size, local),
            hidden=hidden,
            intermediate=inter // tp_size,
            dtype="fp8" if dtype.startswith("fp8") else dtype,
            buffer_rows=tokens * top_k,
        )
        rows.append(Row((hidden, inter, top_k, experts), work, 1, 1, float(r["latency_ms"]) * 1e3))
    return rows


def exchange_rows(data: Path, phase: str) -> list[Row]:
    """DeepEP on H100: fp8 dispatch with a 4-byte scale per 128 elements, bf16 combine; a group is a token count.

    Prefill rows are those with 20 SMs, SGLang's setting, and at least 256 tokens; its notify step is included.
    """
    rows = []
    path = "perf/deepep_ll_h100.csv" if phase == "decode" else "perf/deepep_normal_h100.csv"
    for r in read(data / path):
        nodes, tokens, top_k = int(r["node_num"]), int(r["num_token"]), int(r["num_topk"])
        if phase == "prefill" and (r["dispatch_sms"] != "20" or tokens < 256):
            continue
        for direction, size in (("dispatch", 1 + 4 / 128), ("combine", 2)):
            measured = (
                float(r[f"{direction}_avg_t_us"])
                if phase == "decode"
                else float(r[f"{direction}_transmit_us"]) + float(r[f"{direction}_notify_us"])
            )
            work = AllToAll(
                tokens=tokens,
                bytes_per_token=int(r["hidden_size"]) * size,
                distinct_devices=uniform_distinct(top_k, 8 * nodes),
                distinct_nodes=uniform_distinct(top_k, nodes),
                top_k=top_k,
                phase="decode" if phase == "decode" else "prefill",
            )
            rows.append(Row((tokens,), work, nodes, 8, measured))
    return rows


def gather_rows(data: Path, system: str) -> list[Row]:
    """NCCL all-gather of 16-bit elements inside a node; message_size counts the elements gathered in all."""
    rows = []
    for r in read(data / "perf/nccl_latency.csv"):
        wanted = (r["system"], r["op_name"], r["nccl_dtype"]) == (system, "all_gather", "half")
        if wanted and r["version"]:
            devices, elements = int(r["num_gpus"]), int(r["message_size"])
            work = AllGather(shard_bytes=2.0 * elements / devices)
            rows.append(Row((elements,), work, 1, devices, float(r["latency"]) * 1e3))
    return rows


def x86_rows(data: Path) -> list[Row]:
    """The faster of vLLM's two CPU ops on whole bf16 MoE blocks (Mixtral's split in four); a group is one shape."""
    shapes = {"qwen3": (2048, 768, 8), "olmoe": (2048, 1024, 8), "mixtral": (4096, 3584, 2)}
    best: dict[tuple[str, int], tuple[float, int]] = {}
    for r in read(data / "reference/x86_moe_block_baselines.csv"):
        if r["shape"] in shapes and r["dtype"] == "bfloat16" and r["impl"].startswith("vllm") and r["ms"]:
            key = (r["shape"], int(r["M"]))
            best[key] = min(best.get(key, (np.inf, 0)), (float(r["ms"]) * 1e3, int(float(r["hit"]))))
    rows = []
    for (shape, tokens), (measured, active) in best.items():
        hidden, intermediate, top_k = shapes[shape]
        work = ExpertLayer(
            tokens=tokens,
            rows=tokens * top_k,
            experts_active=active,
            hidden=hidden,
            intermediate=intermediate,
            dtype="bfloat16",
        )
        rows.append(Row((shape,), work, 1, 1, measured))
    return rows


def with_dense(device: DeviceSpec, x: Sequence[float]) -> DeviceSpec:
    return replace(device, dense=_roofs(device.dense, x[0], "bfloat16", x[1], x[2]))


def with_experts(device: DeviceSpec, x: Sequence[float]) -> DeviceSpec:
    experts = _roofs(device.experts, x[0], "bfloat16", x[1], x[2])
    return replace(device, experts=experts, elementwise_efficiency=x[3])


def _roofs(old: Roofline, memory: float, dtype: str, compute: float, overhead: float) -> Roofline:
    efficiency = {**old.compute_efficiency, dtype: compute}
    return Roofline(memory_efficiency=memory, compute_efficiency=efficiency, overhead_us=overhead)


def with_fp8(kind: str) -> Callable[[DeviceSpec, Sequence[float]], DeviceSpec]:
    """Only the fp8 efficiency is free: memory and overhead are those of bf16."""

    def apply(device: DeviceSpec, x: Sequence[float]) -> DeviceSpec:
        old = device.dense if kind == "dense" else device.experts
        new = _roofs(old, old.memory_efficiency, "fp8", x[0], old.overhead_us)
        return replace(device, dense=new) if kind == "dense" else replace(device, experts=new)

    return apply


def with_links(kind: str) -> Callable[[DeviceSpec, Sequence[float]], DeviceSpec]:
    """Parameters: alpha and efficiency inside a node, then (where given) the same between nodes."""

    def apply(device: DeviceSpec, x: Sequence[float]) -> DeviceSpec:
        links = []
        for link, alpha, efficiency in zip(
            (device.intra_link, device.inter_link), x[0::2], x[1::2], strict=False
        ):
            alphas, efficiencies = {**link.alpha_us, kind: alpha}, {**link.efficiency, kind: efficiency}
            links.append(replace(link, alpha_us=alphas, efficiency=efficiencies))
        intra, inter = links if len(links) == 2 else (links[0], device.inter_link)
        return replace(device, intra_link=intra, inter_link=inter)

    return apply


def families(name: str, data: Path) -> list[Family]:
    roofs, links = ("memory", "compute", "overhead_us"), ("alpha_us", "efficiency")
    both = (*(f"intra {x}" for x in links), *(f"inter {x}" for x in links))
    layer = (*roofs, "elementwise")
    if name == "x86":
        return [Family("experts", layer, (1.0, 0.5, 100.0, 0.5), with_experts, x86_rows(data))]
    system = {"h100-sxm": "h100_sxm", "a100-sxm": "a100_sxm"}[name]
    kernel, ep = ("vllm_unquantized", True) if name == "h100-sxm" else ("sglang_fused_moe_triton", False)
    found = [
        Family("dense", roofs, (0.85, 0.8, 3.0), with_dense, dense_rows(data, system, "bfloat16")),
        Family(
            "experts",
            layer,
            (0.88, 0.56, 38.0, 0.6),
            with_experts,
            expert_rows(data, system, kernel, "bfloat16", ep=ep),
        ),
        Family("collective", links, (8.0, 0.8), with_links("collective"), gather_rows(data, system)),
    ]
    if name == "h100-sxm":
        fp8 = expert_rows(data, system, "vllm_fp8moe_triton", "fp8_block", ep=True)
        found += [
            Family("dense_fp8", ("compute",), (0.7,), with_fp8("dense"), dense_rows(data, system, "fp8")),
            Family("experts_fp8", ("compute",), (0.5,), with_fp8("experts"), fp8),
            Family(
                "decode", both, (13.0, 0.5, 8.0, 0.95), with_links("decode"), exchange_rows(data, "decode")
            ),
            Family(
                "prefill",
                both,
                (40.0, 0.7, 25.0, 0.95),
                with_links("prefill"),
                exchange_rows(data, "prefill"),
            ),
        ]
    return found


def device_left_out(data: Path, expert_parallel: bool) -> Array:
    """Errors on the A100's Triton layers by efficiencies that saw only the H100's, vLLM's and SGLang's."""
    other, device = load_device("h100-sxm"), load_device("a100-sxm")
    sglang = "sglang_fused_moe_triton"
    seen = [
        row
        for kernel in ("vllm_unquantized", sglang)
        for row in expert_rows(data, "h100_sxm", kernel, "bfloat16", ep=True)
    ]
    family = Family("experts", (), (0.88, 0.56, 38.0, 0.6), with_experts, seen)
    unseen = expert_rows(data, "a100_sxm", sglang, "bfloat16", ep=expert_parallel)
    return relative_errors(with_experts(device, fit(other, family, seen)), unseen)


def main() -> None:
    data = Path(os.environ.get("MOECC_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    for name in sys.argv[1:] or ["h100-sxm", "a100-sxm", "x86"]:
        device = load_device(name)
        for family in families(name, data):
            errors = held_out_errors(device, family)
            constants = fit(device, family, family.rows)
            device = family.apply(device, constants)
            shown = ", ".join(
                f"{key} {value:.3g}" for key, value in zip(family.names, constants, strict=True)
            )
            print(
                f"{name} {family.model}: {shown} | {len(family.rows)} rows, held-out error: "
                f"median {100 * np.median(errors):.1f} %, 90th percentile {100 * np.quantile(errors, 0.9):.1f} %",
                flush=True,
            )
    for expert_parallel in (False, True):
        errors = device_left_out(data, expert_parallel)
        what = "any expert parallelism" if expert_parallel else "no expert parallelism"
        print(f"a100-sxm left out, {what}: {len(errors)} rows, median error {100 * np.median(errors):.1f} %")


if __name__ == "__main__":
    main()
