"""What a device's latency model says about one expert layer, as the plain numbers that placement minimises."""

from __future__ import annotations

from dataclasses import replace

from moecc.hardware.latency import AllToAll, ExpertLayer, latency_us
from moecc.hardware.spec import DTYPE_BYTES, Cluster
from moecc.solvers.placement.step_cost import StepCost

EXCHANGE = "prefill"
"""The exchange that sends one copy of a token to each device, which is what fan-out counts."""


def step_cost(
    cluster: Cluster,
    *,
    hidden: int,
    intermediate: int,
    top_k: int,
    slots: int,
    dtype: str,
    tokens_per_device: int,
    gated: bool = True,
) -> StepCost:
    """The latency model of the expert layer as a straight line through balanced load and half as much again.

    slots: experts that a device holds; gated: whether they have a gate beside up. The times are predictions;
    cluster.device.confidence() says how good.
    """
    rows = float(tokens_per_device * top_k)
    layer = ExpertLayer(
        tokens=rows,
        rows=rows,
        experts_active=slots * (1 - (1 - 1 / slots) ** rows),
        hidden=hidden,
        intermediate=intermediate,
        dtype=dtype,
        gated=gated,
    )
    balanced = latency_us(layer, cluster)
    slope = (latency_us(replace(layer, rows=1.5 * rows), cluster) - balanced) / (0.5 * rows)
    token_bytes = hidden * DTYPE_BYTES[dtype]
    empty = AllToAll(
        tokens=0,
        bytes_per_token=token_bytes,
        distinct_devices=1,
        distinct_nodes=1,
        top_k=top_k,
        phase="prefill",
    )
    links = (cluster.device.intra_link, cluster.device.inter_link)
    return StepCost(
        compute_us_per_row=slope,
        fixed_us=max(0.0, balanced - slope * rows) + 2 * latency_us(empty, cluster),
        tokens=tokens_per_device * cluster.devices,
        bytes_per_token=2.0 * token_bytes,
        us_per_byte_by_tier=(0.0, *(1 / link.bytes_per_us(EXCHANGE) for link in links)),
    )
