"""Device loads under the dispatch rules that do not split evenly, by code that shares nothing with the solvers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.solvers.placement.check_traffic import Floats, hosts, token_homes
from moecc.solvers.placement.dispatch import fractions
from moecc.solvers.placement.placement import Placement
from moecc.solvers.routing import Routing


def near_loads(placement: Placement, routings: Sequence[Routing]) -> Floats:
    """[routings, layers, devices]: the share of assignments that each device serves under dispatch `nearest`."""
    found = np.empty((len(routings), placement.layers, placement.devices))
    for layer in range(placement.layers):
        held = hosts(placement, layer)
        served = fractions("nearest", held, np.ones(len(held)), placement.devices_per_node)
        for row, routing in enumerate(routings):
            sent = _sent(placement, routing, layer)
            found[row, layer] = np.einsum("he,hed->d", sent, served)
    return found


def lp_loads(placement: Placement, expert_loads: Floats) -> Floats:
    """[rows, layers, devices] from [rows, layers, experts]: an LP for each row and layer."""
    found = np.empty((*expert_loads.shape[:2], placement.devices))
    for layer in range(placement.layers):
        held = hosts(placement, layer)
        for row, loads in enumerate(expert_loads[:, layer]):
            found[row, layer] = loads @ fractions("lp", held, loads, placement.devices_per_node)[0]
    return found


def _sent(placement: Placement, routing: Routing, layer: int) -> Floats:
    """[homes, experts]: the share of assignments from each home to each expert."""
    homes, ids = token_homes(placement, routing), routing.topk_ids[:, layer]
    sent = np.zeros((placement.devices, placement.num_experts))
    if homes is None:
        sent += np.bincount(ids.ravel(), minlength=placement.num_experts) / placement.devices
    else:
        np.add.at(sent, (np.broadcast_to(homes[:, None], ids.shape), ids), 1.0)
    return sent / ids.size
