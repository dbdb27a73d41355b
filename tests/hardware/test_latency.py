"""Latency models: numbers worked out by hand, and what must hold for all inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.hardware import (
    AllGather,
    AllToAll,
    Cluster,
    Compute,
    ExpertLayer,
    GroupedGemm,
    Work,
    device_names,
    latency_us,
    load_device,
    uniform_distinct,
)

H100 = load_device("h100-sxm")
ONE = Cluster(device=H100)
BIG = Cluster(device=H100, nodes=4, devices_per_node=8)
LAYER = ExpertLayer(
    tokens=512, rows=4096, experts_active=128, hidden=2048, intermediate=768, dtype="bfloat16"
)
PREFILL = AllToAll(
    tokens=4096, bytes_per_token=14336, distinct_devices=6.0, distinct_nodes=3.0, top_k=8, phase="prefill"
)
DECODE = replace(PREFILL, tokens=128, phase="decode")


def test_compute_at_its_roofs() -> None:
    launch = H100.dense.overhead_us
    moved = latency_us(Compute(flops=0, bytes=3.35e9, dtype="bfloat16", launches=2), ONE)
    assert moved == pytest.approx(1000 / H100.dense.memory_efficiency + 2 * launch)
    computed = latency_us(Compute(flops=989e9, bytes=0, dtype="bfloat16", launches=0), ONE)
    assert computed == pytest.approx(1000 / H100.dense.compute_efficiency["bfloat16"])
    both = latency_us(Compute(flops=989e9, bytes=3.35e9, dtype="bfloat16", launches=0), ONE)
    assert max(moved - 2 * launch, computed) < both < moved + computed


def test_decode_sends_a_copy_per_expert() -> None:
    """128 tokens x 8 copies of 14,336 bytes over 2 nodes: half of them cross, at 92.8 % of 50 GB/s."""
    cluster = Cluster(device=H100, nodes=2, devices_per_node=8)
    link = H100.inter_link
    crossing = 128 * 8 * 14336 / 2 / (50e3 * link.efficiency["decode"])
    alpha = H100.intra_link.alpha_us["decode"] + link.alpha_us["decode"]
    assert latency_us(DECODE, cluster) == pytest.approx(alpha + crossing, rel=0.02)
    assert latency_us(replace(DECODE, distinct_devices=1.5), cluster) == latency_us(DECODE, cluster)


def test_prefill_gains_from_fewer_nodes_and_devices() -> None:
    base = latency_us(PREFILL, BIG)
    assert latency_us(replace(PREFILL, distinct_nodes=1.5), BIG) < 0.75 * base
    one_node = Cluster(device=H100, nodes=1, devices_per_node=8)
    alpha = H100.intra_link.alpha_us["prefill"]
    full = latency_us(PREFILL, one_node) - alpha
    assert latency_us(replace(PREFILL, distinct_devices=3.0), one_node) - alpha == pytest.approx(full / 2)


@pytest.mark.parametrize("name", device_names())
@pytest.mark.parametrize("work", [PREFILL, DECODE, AllGather(shard_bytes=1e6)])
def test_one_device_exchanges_nothing(name: str, work: Work) -> None:
    device = load_device(name)
    assert latency_us(work, Cluster(device=device)) == 0.0
    assert latency_us(work, Cluster(device=device, devices_per_node=2)) > 0.0
    assert latency_us(work, Cluster(device=device, nodes=2)) > 0.0


def test_missing_dtype_is_named() -> None:
    with pytest.raises(InputError, match=r"a100-sxm has no peak for dtype 'fp8'; hint: known: bfloat16"):
        latency_us(replace(LAYER, dtype="fp8"), Cluster(device=load_device("a100-sxm")))


def test_expert_layer_is_its_parts() -> None:
    up = GroupedGemm(rows=4096, experts_active=128, n=1536, k=2048, dtype="bfloat16")
    down = replace(up, n=2048, k=768)
    rest = latency_us(LAYER, ONE) - latency_us(up, ONE) - latency_us(down, ONE)
    elements = 4096 * (3 * 768 + 2048) + 512 * 2048
    expected = H100.experts.overhead_us + elements * 2 / (3.35e6 * H100.elementwise_efficiency)
    assert rest == pytest.approx(expected)
    assert latency_us(replace(LAYER, gated=False), ONE) < latency_us(LAYER, ONE)
    assert latency_us(replace(LAYER, buffer_rows=8 * 4096), ONE) > latency_us(LAYER, ONE)


FIELDS = [
    (Compute(flops=1e9, bytes=1e6, dtype="bfloat16"), ("flops", "bytes", "launches"), ONE),
    (LAYER, ("tokens", "rows", "experts_active", "hidden", "intermediate"), ONE),
    (PREFILL, ("tokens", "bytes_per_token", "distinct_devices", "distinct_nodes"), BIG),
    (DECODE, ("tokens", "bytes_per_token", "top_k"), BIG),
    (AllGather(shard_bytes=1e6), ("shard_bytes",), BIG),
]


@pytest.mark.parametrize(
    ("work", "field", "cluster"),
    [(work, field, cluster) for work, fields, cluster in FIELDS for field in fields],
)
@given(scale=st.floats(0.01, 100), factor=st.floats(1, 10), name=st.sampled_from(device_names()))
def test_more_is_never_faster(
    work: Work, field: str, cluster: Cluster, scale: float, factor: float, name: str
) -> None:
    cluster = replace(cluster, device=load_device(name))
    base = replace(work, **{field: getattr(work, field) * scale})
    more = replace(work, **{field: getattr(work, field) * scale * factor})
    assert 0.0 <= latency_us(base, cluster) <= latency_us(more, cluster) * (1 + 1e-12)


@given(name=st.sampled_from(device_names()), speed=st.floats(1, 4))
def test_a_faster_device_is_never_slower(name: str, speed: float) -> None:
    slow = load_device(name)
    fast = replace(
        slow,
        memory_bandwidth_gb_s=slow.memory_bandwidth_gb_s * speed,
        peak_tflops={dtype: peak * speed for dtype, peak in slow.peak_tflops.items()},
    )
    assert latency_us(LAYER, Cluster(device=fast)) <= latency_us(LAYER, Cluster(device=slow)) * (1 + 1e-12)


@given(nodes=st.integers(1, 8), more=st.integers(1, 4))
def test_more_nodes_are_never_faster(nodes: int, more: int) -> None:
    for work in (PREFILL, DECODE):
        small = Cluster(device=H100, nodes=nodes, devices_per_node=8)
        large = replace(small, nodes=nodes + more)
        if work.phase == "prefill" or nodes > 1:
            assert latency_us(work, small) <= latency_us(work, large) * (1 + 1e-12)


@pytest.mark.parametrize(("top_k", "groups"), [(8, 8), (2, 4), (8, 32), (6, 1)])
def test_uniform_distinct_by_simulation(top_k: int, groups: int) -> None:
    draws = np.random.default_rng(0).integers(groups, size=(20000, top_k))
    counted = np.mean([len(set(row)) for row in draws])
    assert uniform_distinct(top_k, groups) == pytest.approx(counted, rel=0.01)
