"""What the schedule is told: latencies follow from what the placement measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moecc.hardware import Cluster, Compute, latency_us, load_device
from moecc.ir.core import Op, Value
from moecc.ir.ops import AllToAll, Attention, Experts, SharedExpert
from moecc.ir.types import parse_type
from moecc.passes.costs import Situation, op_latency_us
from moecc.passes.overlap import Spread

CLUSTER = Cluster(device=load_device("h100-sxm"), nodes=2, devices_per_node=8)
PREFILL = Situation(phase="prefill", tokens=4096, cluster=CLUSTER, top_k=8)
DECODE = replace(PREFILL, phase="decode", tokens=128)
SPREAD = Spread(
    devices=16,
    nodes=2,
    slots=8,
    fan_out=5.0,
    node_fan_out=1.9,
    hops=0.6,
    node_hops=0.3,
    imbalance=1.1,
    execution="home",
)


def _op(kind: type[Op], attributes: dict[str, Any], **operands: str) -> Op:
    return kind({name: Value(name, parse_type(text)) for name, text in operands.items()}, attributes)


def _exchange_us(spread: Spread, direction: str, situation: Situation = PREFILL) -> float:
    devices, nodes = spread.remote(direction)
    attributes = {
        "direction": direction,
        "devices": 16,
        "slots": 8,
        "fan_out": spread.fan_out,
        "remote_devices": devices,
        "remote_nodes": nodes,
    }
    rows = "T" if direction == "dispatch" else "5*T"
    op = _op(AllToAll, attributes, x=f"tokens<{rows} x 2048 x bfloat16>", routing="routing<T x 8 of 128>")
    return op_latency_us(op, situation)


@pytest.mark.parametrize("situation", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_fewer_hops_make_a_migrating_dispatch_faster(situation: Situation) -> None:
    migrating = replace(SPREAD, execution="migrate")
    staying = replace(migrating, hops=0.0, node_hops=0.0)
    assert _exchange_us(staying, "dispatch", situation) < 0.95 * _exchange_us(
        migrating, "dispatch", situation
    )
    assert _exchange_us(staying, "combine", situation) == _exchange_us(migrating, "combine", situation)


def test_hops_mean_nothing_to_home() -> None:
    assert _exchange_us(replace(SPREAD, hops=0.0, node_hops=0.0), "dispatch") == _exchange_us(
        SPREAD, "dispatch"
    )


def test_fan_out_is_paid_for() -> None:
    assert _exchange_us(replace(SPREAD, fan_out=3.0, node_fan_out=1.2), "dispatch") < 0.8 * _exchange_us(
        SPREAD, "dispatch"
    )


@pytest.mark.parametrize("kind", ["experts", "exchange"])
def test_everyone_waits_for_the_busiest_device(kind: str) -> None:
    busy = replace(PREFILL, imbalance=2.0)
    if kind == "exchange":
        ratio = _exchange_us(SPREAD, "dispatch", busy) / _exchange_us(SPREAD, "dispatch")
    else:
        weights = {
            "gate_up": "weights<8 x 1536 x 2048 x bfloat16>",
            "down": "weights<8 x 2048 x 768 x bfloat16>",
        }
        rows, routing = "tokens<8*T x 2048 x bfloat16>", "routing<5*T x 8/5 of 8>"
        op = _op(Experts, {}, rows=rows, routing=routing, **weights)
        ratio = op_latency_us(op, busy) / op_latency_us(op, PREFILL)
    assert 1.5 < ratio <= 2.0


def test_attention_reads_the_context_in_decode() -> None:
    """By hand: 128 tokens, each reading 4096 cached tokens of 2048 bytes, are 1.07 GB beside 38 MB of weights."""
    attributes = {
        "flops_per_token": 3.8e7,
        "flops_per_context_token": 16384.0,
        "weight_bytes": 38_000_000,
        "kv_bytes_per_token": 2048,
        "context": 4096,
    }
    op = _op(Attention, attributes, x="tokens<T x 2048 x bfloat16>")
    moved = 38_000_000 + 128 * 4096 * 2048 + 4 * 128 * 2048 * 2
    by_hand = Compute(flops=128 * (3.8e7 + 16384.0 * 4096), bytes=moved, dtype="bfloat16", launches=6)
    assert op_latency_us(op, DECODE) == pytest.approx(latency_us(by_hand, CLUSTER))
    assert op_latency_us(op, DECODE) > moved / (CLUSTER.device.memory_bandwidth_gb_s * 1e3)


@pytest.mark.parametrize(
    ("situation", "states"), [(DECODE, 2 * 128), (PREFILL, 0)], ids=["decode", "prefill"]
)
def test_a_state_is_read_and_written_once_a_sequence(situation: Situation, states: int) -> None:
    """By hand: Jamba's Mamba layer, 8192 x 16 numbers of state in float32; in decode a token is a sequence."""
    attributes = {
        "flops_per_token": 2.1e8,
        "flops_per_context_token": 0.0,
        "weight_bytes": 210_000_000,
        "kv_bytes_per_token": 0,
        "state_bytes": 8192 * 16 * 4,
        "context": 0,
    }
    op = _op(Attention, attributes, x="tokens<T x 4096 x bfloat16>")
    moved = 210_000_000 + states * 8192 * 16 * 4 + 4 * situation.tokens * 4096 * 2
    by_hand = Compute(flops=situation.tokens * 2.1e8, bytes=moved, dtype="bfloat16", launches=6)
    assert op_latency_us(op, situation) == pytest.approx(latency_us(by_hand, CLUSTER))


def test_a_layer_without_a_mixer_is_one_launch() -> None:
    attributes = {
        "flops_per_token": 0.0,
        "flops_per_context_token": 0.0,
        "weight_bytes": 0,
        "kv_bytes_per_token": 0,
        "context": 4096,
    }
    op = _op(Attention, attributes, x="tokens<T x 2048 x bfloat16>")
    norm = Compute(flops=0, bytes=2 * 4096 * 2048 * 2, dtype="bfloat16", launches=1)
    assert op_latency_us(op, PREFILL) == pytest.approx(latency_us(norm, CLUSTER))


def test_experts_without_a_gate_are_a_matrix_less() -> None:
    """Two GEMMs of equal size instead of three: two thirds of the time where launches do not count."""
    rows, routing = "tokens<8*T x 2048 x bfloat16>", "routing<T x 8 of 128>"
    down = "weights<128 x 2048 x 768 x bfloat16>"
    gated = _op(
        Experts, {}, rows=rows, routing=routing, gate_up="weights<128 x 1536 x 2048 x bfloat16>", down=down
    )
    plain = _op(
        Experts,
        {"activation": "relu2"},
        rows=rows,
        routing=routing,
        gate_up="weights<128 x 768 x 2048 x bfloat16>",
        down=down,
    )
    ratio = op_latency_us(plain, PREFILL) / op_latency_us(gated, PREFILL)
    assert 0.6 < ratio < 0.8


def test_shared_experts_are_several_launches() -> None:
    weights = {"gate_up": "weights<1 x 128 x 64 x bfloat16>", "down": "weights<1 x 64 x 64 x bfloat16>"}
    op = _op(SharedExpert, {}, x="tokens<T x 64 x bfloat16>", **weights)
    launch_us = CLUSTER.device.dense.overhead_us
    few, many = (op_latency_us(op, replace(DECODE, tokens=tokens)) for tokens in (16, 64))
    assert few == pytest.approx(3 * launch_us, rel=0.05)
    assert many == pytest.approx(4 * launch_us, rel=0.05)
