"""One workload under one placement, layer by layer: plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moecc.solvers.placement.check_balance import layer_imbalance
from moecc.solvers.placement.check_reach import Ints, Reach, reach_of
from moecc.solvers.placement.check_traffic import Floats, Tolls, token_homes
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import Execution
from moecc.solvers.routing import Routing

PAIRED = 1 << 20
"""Pairs of experts of adjacent layers that are counted at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """imbalance, fan_out, node_fan_out: [layers], of Metrics. hops, node_hops, same_device_pairs: means over the layer
    transitions, 0 if there is none; hops as under `migrate`.
    sent: of each execution [layers, 3 + tiers]: remote fan-out, remote node fan-out, copies over each tier, their cost.
    """

    imbalance: Floats
    fan_out: Floats
    node_fan_out: Floats
    hops: float
    node_hops: float
    same_device_pairs: float
    sent: Mapping[Execution, Floats]


def survey(placement: Placement, routing: Routing, executions: Sequence[Execution], tolls: Tolls) -> Survey:
    """The devices that tokens reach are found once for all executions."""
    homes, per_node = token_homes(placement, routing), placement.devices_per_node
    fan_outs, sent = [], {execution: list[list[float]]() for execution in executions}
    landings: list[Ints] = []
    for layer in range(placement.layers):
        reach = reach_of(placement, layer, routing.topk_ids[:, layer])
        nodes = reach.grouped(per_node)
        fan_outs.append((len(reach.token) / reach.tokens, len(nodes.token) / nodes.tokens))
        landings.append(reach.landing.astype(np.int32))
        for execution, rows in sent.items():
            at = reach.landing if execution == "migrate" else homes
            near = None if at is None else at // per_node
            remote = [
                _remote(reach, at, placement.devices),
                _remote(nodes, near, placement.devices // per_node),
            ]
            rows.append(remote + tolls.of(reach, at))
    fan_out, node_fan_out = np.array(fan_outs, np.float64).T
    return Survey(
        imbalance=layer_imbalance(placement, routing.loads()),
        fan_out=fan_out,
        node_fan_out=node_fan_out,
        hops=_changes(landings),
        node_hops=_changes([landing // per_node for landing in landings]),
        same_device_pairs=_pairs(placement, routing),
        sent={execution: np.array(rows, np.float64) for execution, rows in sent.items()},
    )


def _remote(reach: Reach, homes: Ints | None, places: int) -> float:
    """Places that a token reaches but its home; homes: [tokens], None: the exact mean over all places."""
    at_home = len(reach.token) / places if homes is None else (reach.device == homes[reach.token]).sum()
    return float((len(reach.token) - at_home) / reach.tokens)


def _changes(landings: Sequence[Ints]) -> float:
    changed = [int((now != before).sum()) for before, now in pairwise(landings)]
    return sum(changed) / (len(changed) * len(landings[0])) if changed else 0.0


def _pairs(placement: Placement, routing: Routing) -> float:
    """Share of the top_k x top_k expert pairs of adjacent layers that some device holds both of."""
    tokens, layers, k = routing.topk_ids.shape
    size, step = placement.num_experts, max(1, PAIRED // (k * k))
    held = placement.physical_to_logical.reshape(layers, placement.devices, -1).astype(np.int64)
    met = 0
    for layer in range(1, layers):
        together = np.zeros(size * size, np.bool_)
        together[held[layer - 1][:, :, None] * size + held[layer][:, None, :]] = True
        for at in range(0, tokens, step):
            ids: Ints = routing.topk_ids[at : at + step, layer - 1 : layer + 1].astype(np.int64)
            met += int(np.count_nonzero(together[ids[:, 0, :, None] * size + ids[:, 1, None, :]]))
    return met / (tokens * k * k * (layers - 1)) if layers > 1 else 0.0
