"""What an operation asks of the hardware: from IR to `Work`, as data in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from moecc.hardware.latency import AllGather, AllToAll, Compute, ExpertLayer, Work, latency_us
from moecc.hardware.spec import Cluster
from moecc.ir import ops
from moecc.ir.core import Op, Value
from moecc.ir.semantics import Activation
from moecc.ir.types import DTYPE_BYTES, RoutingType, TokensType, WeightsType
from moecc.passes.lower import FUSED_COMBINE_TOKENS, ONE_LAUNCH_TOKENS

Phase = Literal["decode", "prefill"]
# Norm, qkv, rope, attention, output projection, residual and norm; a state-space mixer takes about as many.
ATTENTION_LAUNCHES = 6


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What costs depend on beside the op: tokens of one device in one step, the cluster, and how experts spread.

    imbalance: largest device load / mean, the device that everyone waits for. It is that of the whole trace; one
    step of few tokens is less balanced.
    """

    phase: Phase
    tokens: int
    cluster: Cluster
    top_k: int
    imbalance: float = 1.0


def op_latency_us(op: Op, situation: Situation) -> float:
    """Predicted time of `op` in microseconds; 0 for what is fused into its neighbours.

    Raises InputError where the device has no peak for the op's dtype.
    """
    work_of = _WORK.get(type(op))
    return latency_us(work_of(op, situation), situation.cluster) if work_of else 0.0


def stream_of(op: Op) -> str:
    return "comm" if isinstance(op, (ops.AllToAll, ops.AllGather)) else "compute"


def _rows(value: Value, situation: Situation) -> float:
    return cast(TokensType, value.type).rows.at(situation.tokens)


def _weights(value: Value) -> WeightsType:
    return cast(WeightsType, value.type)


def _dtype(value: Value) -> str:
    return cast(TokensType, value.type).dtype


def _row_bytes(value: Value) -> int:
    tokens = cast(TokensType, value.type)
    return tokens.hidden * DTYPE_BYTES[tokens.dtype]


def _attention(op: Any, situation: Situation) -> Work:
    """Decode reads the context of every token; in prefill a token sees half the step's tokens on average.

    A state is read and written once a sequence: in decode that is a token, in prefill too few to count.
    """
    if not op.weight_bytes:
        return Compute(flops=0, bytes=2 * _rows(op.x, situation) * _row_bytes(op.x), dtype=_dtype(op.x))
    rows, decode = _rows(op.x, situation), situation.phase == "decode"
    context = op.context if decode else min(op.context, situation.tokens / 2)
    kv_tokens = rows * context if decode else rows
    return Compute(
        flops=rows * (op.flops_per_token + op.flops_per_context_token * context),
        bytes=op.weight_bytes
        + kv_tokens * op.kv_bytes_per_token
        + (2 * rows * op.state_bytes if decode else 0)
        + 4 * rows * _row_bytes(op.x),
        dtype=_dtype(op.x),
        launches=ATTENTION_LAUNCHES,
    )


def _mlp(op: Any, situation: Situation) -> Compute:
    rows, weights = _rows(op.x, situation), (_weights(op.gate_up), _weights(op.down))
    parameters = sum(w.bytes / DTYPE_BYTES[w.dtype] for w in weights)
    return Compute(
        flops=2 * rows * parameters,
        bytes=sum(w.bytes for w in weights) + 2 * rows * _row_bytes(op.x),
        dtype=weights[0].dtype,
        launches=2,
    )


def _shared_expert(op: Any, situation: Situation) -> Work:
    """The experts' kernels: plan, gate-up and down, beyond some tokens combine, beyond more scatter.

    Behind a gate the router stands for the plan; its one row of weights is not worth counting.
    """
    rows = _rows(op.x, situation)
    launches = 3 + (rows > FUSED_COMBINE_TOKENS) + (rows > ONE_LAUNCH_TOKENS)
    return replace(_mlp(op, situation), launches=launches)


def _gate(op: Any, situation: Situation) -> Work:
    rows, weight = _rows(op.x, situation), _weights(op.weight)
    experts, hidden = weight.shape
    return Compute(
        flops=2 * rows * experts * hidden,
        bytes=weight.bytes + rows * _row_bytes(op.x),
        dtype=_dtype(op.x),
    )


def _all_to_all(op: Any, situation: Situation) -> Work:
    """Bytes of the busiest device. The model takes homes to be random: copies are scaled to those that leave."""
    devices, nodes = situation.cluster.devices, situation.cluster.nodes
    distinct = op.remote_devices * devices / (devices - 1)
    return AllToAll(
        tokens=cast(RoutingType, op.routing.type).tokens.at(situation.tokens) * situation.imbalance,
        bytes_per_token=_row_bytes(op.x),
        distinct_devices=distinct,
        distinct_nodes=op.remote_nodes * nodes / (nodes - 1) if nodes > 1 else 1.0,
        top_k=situation.top_k * distinct / op.fan_out if op.fan_out else 0.0,
        phase=situation.phase,
    )


def _experts(op: Any, situation: Situation) -> Work:
    """Rows of the busiest device. Experts are taken to be hit alike: fewer are, where routing is skewed."""
    routing = cast(RoutingType, op.routing.type)
    rows = routing.assignments.at(situation.tokens)
    count, hidden, intermediate = _weights(op.down).shape
    return ExpertLayer(
        tokens=routing.tokens.at(situation.tokens),
        rows=rows * situation.imbalance,
        experts_active=count * (1 - (1 - 1 / count) ** rows),
        hidden=hidden,
        intermediate=intermediate,
        dtype=_weights(op.down).dtype,
        gated=Activation(kind=op.activation).gated,
    )


def _residual(op: Any, situation: Situation) -> Work:
    moved = _rows(op.total, situation) * _row_bytes(op.total) * (len(op.parts) + 1)
    return Compute(flops=0, bytes=moved, dtype=_dtype(op.total))


def _all_gather(op: Any, situation: Situation) -> Work:
    return AllGather(shard_bytes=_rows(op.x, situation) * op.bytes_per_token)


_WORK: Mapping[type[Op], Callable[[Any, Situation], Work]] = {
    ops.Attention: _attention,
    ops.DenseMlp: _mlp,
    ops.Gate: _gate,
    ops.AllToAll: _all_to_all,
    ops.AllGather: _all_gather,
    ops.Experts: _experts,
    ops.SharedExpert: _shared_expert,
    ops.Residual: _residual,
}
