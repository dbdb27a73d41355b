"""Latency models: `latency_us(work, cluster)` is the only way in.

Two roofs (compute and memory; links inside and between nodes) combine as a p-norm, because near the ridge a
kernel reaches neither of them. `benchmarks/fit_hardware.py` fits the constants and reports the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moecc.errors import InputError
from moecc.hardware.spec import DTYPE_BYTES, Cluster, DeviceSpec, Roofline

ROOF_EXPONENT = 3.0
OUTPUT_BYTES = 2  # activations leave a GEMM in 16 bits whatever its operands are


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Kernels on one device that do `flops` operations and move `bytes` of device memory in `launches` launches."""

    flops: float
    bytes: float
    dtype: str
    launches: int = 1


@dataclass(frozen=True, kw_only=True)
class GroupedGemm:
    """[rows, k] x [experts_active, k, n] on one device, each row with the weights of its expert; no launch time.

    rows: token-expert pairs that this device computes.
    buffer_rows: rows that are written, where a framework also writes those of experts that live elsewhere.
    """

    rows: float
    experts_active: float
    n: int
    k: int
    dtype: str
    buffer_rows: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """The routed experts of one layer on one device: sort, two grouped GEMMs, activation, weighted combine.

    tokens: tokens whose sums are written.  rows, experts_active, buffer_rows: as in GroupedGemm.
    """

    tokens: float
    rows: float
    experts_active: float
    hidden: int
    intermediate: int
    dtype: str
    gated: bool = True
    buffer_rows: float | None = None


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """One dispatch or one combine between all devices.

    tokens: per device.  bytes_per_token: one copy of one token (hidden size times bytes, plus scales).
    distinct_devices, distinct_nodes: mean number of devices and nodes, its own included, whose experts a token
    chose.  The home of a token is taken to be independent of them.
    phase: "prefill" sends one copy to each node and forwards it inside (DeepEP normal kernels);
    "decode" sends one copy for each of the top_k experts (DeepEP low-latency kernels).
    """

    tokens: float
    bytes_per_token: float
    distinct_devices: float
    distinct_nodes: float
    top_k: float
    phase: Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """Every device ends with the shards of all; `shard_bytes` is one device's."""

    shard_bytes: float


Work = Compute | GroupedGemm | ExpertLayer | AllToAll | AllGather


def latency_us(work: Work, cluster: Cluster) -> float:
    """Predicted time of `work` on every device of `cluster`, in microseconds.

    Raises InputError where the device has no peak for the dtype. How far off the prediction is stands in
    `cluster.device.error_pct`.
    """
    return _MODELS[type(work)](work, cluster)


def uniform_distinct(top_k: int, groups: int) -> float:
    """Mean number of distinct groups that `top_k` independent uniform choices among `groups` hit."""
    return groups * (1.0 - (1.0 - 1.0 / groups) ** top_k)


def _two_roofs(first_us: float, second_us: float) -> float:
    return float((first_us**ROOF_EXPONENT + second_us**ROOF_EXPONENT) ** (1.0 / ROOF_EXPONENT))


def _roofline(roofs: Roofline, device: DeviceSpec, *, flops: float, bytes: float, dtype: str) -> float:
    if dtype not in device.peak_tflops:
        known = ", ".join(device.peak_tflops)
        raise InputError(f"device {device.name} has no peak for dtype {dtype!r}", hint=f"known: {known}")
    compute_us = flops / (device.peak_tflops[dtype] * 1e6 * roofs.compute_efficiency[dtype])
    memory_us = bytes / (device.memory_bandwidth_gb_s * 1e3 * roofs.memory_efficiency)
    return _two_roofs(compute_us, memory_us)


def _compute(work: Compute, cluster: Cluster) -> float:
    device = cluster.device
    busy = _roofline(device.dense, device, flops=work.flops, bytes=work.bytes, dtype=work.dtype)
    return busy + work.launches * device.dense.overhead_us


def _grouped_gemm(work: GroupedGemm, cluster: Cluster) -> float:
    device, written = cluster.device, max(work.rows, work.buffer_rows or 0.0)
    padded_rows = work.rows + work.experts_active * device.tile_rows / 2
    read = (work.experts_active * work.n * work.k + work.rows * work.k) * DTYPE_BYTES.get(work.dtype, 0)
    return _roofline(
        device.experts,
        device,
        flops=2.0 * padded_rows * work.n * work.k,
        bytes=read + written * work.n * OUTPUT_BYTES,
        dtype=work.dtype,
    )


def _expert_layer(work: ExpertLayer, cluster: Cluster) -> float:
    device, halves = cluster.device, 2 if work.gated else 1
    up = GroupedGemm(
        rows=work.rows,
        experts_active=work.experts_active,
        n=halves * work.intermediate,
        k=work.hidden,
        dtype=work.dtype,
        buffer_rows=work.buffer_rows,
    )
    down = replace(up, n=work.hidden, k=work.intermediate)
    written = max(work.rows, work.buffer_rows or 0.0)
    elements = written * ((halves + 1) * work.intermediate + work.hidden) + work.tokens * work.hidden
    moved_us = elements * OUTPUT_BYTES / (device.memory_bandwidth_gb_s * 1e3 * device.elementwise_efficiency)
    return device.experts.overhead_us + latency_us(up, cluster) + latency_us(down, cluster) + moved_us


def _remote(groups: int) -> float:
    return (groups - 1) / groups


def _all_to_all(work: AllToAll, cluster: Cluster) -> float:
    payload = work.tokens * work.bytes_per_token
    nodes, inside = cluster.nodes, _remote(cluster.devices_per_node)
    if work.phase == "decode":
        across = payload * work.top_k * _remote(nodes)
        within = payload * work.top_k / nodes * inside
    else:
        across = payload * work.distinct_nodes * _remote(nodes)
        within = payload * work.distinct_devices * inside
    return _exchange(work.phase, within, across, cluster)


def _all_gather(work: AllGather, cluster: Cluster) -> float:
    within = work.shard_bytes * cluster.nodes * (cluster.devices_per_node - 1)
    return _exchange("collective", within, work.shard_bytes * (cluster.nodes - 1), cluster)


def _exchange(kind: str, within: float, across: float, cluster: Cluster) -> float:
    """`within` and `across`: bytes that one device sends inside its node and to other nodes."""
    if cluster.devices == 1:
        return 0.0
    intra, inter = cluster.device.intra_link, cluster.device.inter_link
    steps = 1.0 + math.log2(cluster.devices_per_node) if kind == "collective" else 1.0
    alpha = intra.alpha_us[kind] * steps + inter.alpha_us[kind] * math.log2(cluster.nodes)
    return alpha + _two_roofs(within / intra.bytes_per_us(kind), across / inter.bytes_per_us(kind))


_MODELS: Mapping[type, Callable[[Any, Cluster], float]] = {
    Compute: _compute,
    GroupedGemm: _grouped_gemm,
    ExpertLayer: _expert_layer,
    AllToAll: _all_to_all,
    AllGather: _all_gather,
}
