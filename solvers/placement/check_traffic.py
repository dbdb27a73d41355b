"""Which links a placement's tokens cross, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.check_reach import Ints, Reach, reach_of
from moecc.solvers.placement.links import OTHER_NODE, SAME_NODE, TIER_COSTS, Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.routing import Routing

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Arrivals = tuple[Floats, Floats]
"""[devices] each: the price of a copy that a device receives for itself, and of one for its node to be forwarded."""


def hosts(placement: Placement, layer: int) -> Mask:
    """[experts, devices]: which devices hold the expert."""
    held = np.zeros((placement.num_experts, placement.devices), np.bool_)
    slots = np.arange(placement.slots)
    held[placement.physical_to_logical[layer], slots // placement.slots_per_device] = True
    return held


def copies_sent(reach: Reach, homes: Ints, devices_per_node: int) -> tuple[Ints, Ints]:
    """(source, target) of every copy of every token, homes: [tokens].

    A token is sent once to each device of its home's node and once to each other node, to the device of its home's
    local rank, which forwards it inside (DeepEP, github.com/deepseek-ai/DeepEP).
    """
    per_node, node = devices_per_node, reach.grouped(devices_per_node)
    home, target = homes[reach.token], reach.device
    relay = np.where(
        home // per_node == target // per_node, home, target - target % per_node + home % per_node
    )
    inside = relay != target
    source = homes[node.token]
    across = source // per_node != node.device
    first = node.device * per_node + source % per_node
    return (
        np.concatenate([relay[inside], source[across]]),
        np.concatenate([target[inside], first[across]]),
    )


def arrivals(prices: Floats, devices_per_node: int) -> Arrivals:
    """Mean prices over homes spread evenly, with tokens sent as in copies_sent; prices: [devices, devices]."""
    per_node, nodes = devices_per_node, len(prices) // devices_per_node
    blocks = (prices - np.diag(prices.diagonal())).reshape(nodes, per_node, nodes, per_node)
    inside = np.einsum("nsnt->nt", blocks) / per_node
    across = np.einsum("msns->ns", blocks) / len(prices)
    return inside.ravel(), across.ravel()


def arrivals_by_node(same_node: float, other_node: float, devices: int, devices_per_node: int) -> Arrivals:
    """As `arrivals` of links that cost the same within every node and the same between any two."""
    inside = np.full(devices, same_node * (1 - 1 / devices_per_node))
    return inside, np.full(devices, other_node * (1 / devices_per_node - 1 / devices))


def received(reach: Reach, prices: Arrivals, devices_per_node: int) -> Floats:
    """[devices]: what receiving costs each, mean over tokens, homes spread evenly."""
    devices = len(prices[0])
    by_node = reach.grouped(devices_per_node).visits(devices // devices_per_node)
    return (
        reach.visits(devices) * prices[0] + np.repeat(by_node, devices_per_node) * prices[1]
    ) / reach.tokens


class Tolls:
    """What the copies of a layer's tokens cost, counted link by link; links: None for tiers by node.

    tiers: names of the tiers that are no device itself.
    """

    def __init__(self, links: Links | None, devices: int, devices_per_node: int) -> None:
        self.links, self.per_node = links, devices_per_node
        self.tiers: tuple[str, ...] = (SAME_NODE, OTHER_NODE) if links is None else links.tiers[1:]
        if links is None:
            unit = [(1.0, 0.0), (0.0, 1.0), TIER_COSTS[1:]]
            self.even = [arrivals_by_node(*prices, devices, devices_per_node) for prices in unit]
        else:
            tables = ((links.tier == tier).astype(np.float64) for tier in range(1, len(links.tiers)))
            self.even = [arrivals(table, devices_per_node) for table in (*tables, links.cost)]

    def of(self, reach: Reach, homes: Ints | None) -> list[float]:
        """Copies over each of `tiers`, then the cost of all of them; means over tokens. homes: None for any alike."""
        if homes is None:
            return [float(received(reach, prices, self.per_node).sum()) for prices in self.even]
        source, target = copies_sent(reach, homes, self.per_node)
        if self.links is None:
            near = int((source // self.per_node == target // self.per_node).sum())
            counts = [near, len(source) - near]
            cost = float(np.dot(counts, TIER_COSTS[1:]))
        else:
            counts = np.bincount(self.links.tier[source, target], minlength=len(self.links.tiers))[
                1:
            ].tolist()
            cost = float(self.links.cost[source, target].sum())
        return [value / reach.tokens for value in (*counts, cost)]


def traffic_matrix(placement: Placement, routing: Routing) -> Floats:
    """[devices, devices]: copies of a token sent from row to column under `home`, mean over tokens and layers."""
    size, homes = placement.devices, token_homes(placement, routing)
    sent = np.zeros((size, size))
    for layer in range(placement.layers):
        reach = reach_of(placement, layer, routing.topk_ids[:, layer])
        if homes is None:
            sent += _sent_evenly(reach, size, placement.devices_per_node)
        else:
            np.add.at(sent, copies_sent(reach, homes, placement.devices_per_node), 1.0)
    return sent / (len(routing.topk_ids) * placement.layers)


def _sent_evenly(reach: Reach, devices: int, per_node: int) -> Floats:
    """[devices, devices]: copies from row to column, homes spread evenly."""
    nodes, local = devices // per_node, np.arange(per_node)
    sent = np.zeros((nodes, per_node, nodes, per_node))
    sent[:, local, :, local] = reach.grouped(per_node).visits(nodes) / devices
    every = np.arange(nodes)
    sent[every, :, every, :] = reach.visits(devices).reshape(nodes, 1, per_node) / per_node
    flat = sent.reshape(devices, devices)
    np.fill_diagonal(flat, 0.0)
    return flat


def token_homes(placement: Placement, routing: Routing) -> Ints | None:
    """The trace's homes, checked against the placement's devices."""
    homes = routing.homes
    if homes is None:
        return None
    where = f"workload {routing.name!r}"
    if homes.shape != (len(routing.topk_ids),):
        raise InputError(
            f"homes has shape {list(homes.shape)} for {len(routing.topk_ids)} tokens",
            where=where,
            hint="give one home device for each token",
        )
    if len(homes) and not 0 <= int(homes.min()) <= int(homes.max()) < placement.devices:
        raise InputError(
            f"homes span devices {int(homes.min())} to {int(homes.max())} of {placement.devices}",
            where=where,
            hint="homes are device numbers from 0",
        )
    return homes.astype(np.int64)
