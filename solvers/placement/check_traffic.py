"""Which links a placement's tokens cross, by plain NumPy that shares no code with the solvers it judges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.routing import Routing

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def hosts(placement: Placement, layer: int) -> Mask:
    """[experts, devices]: which devices hold the expert."""
    held = np.zeros((placement.num_experts, placement.devices), np.bool_)
    slots = np.arange(placement.slots)
    held[placement.physical_to_logical[layer], slots // placement.slots_per_device] = True
    return held


def reached(held: Mask, ids: NDArray[np.int16]) -> Mask:
    """[tokens, devices]: the devices that a greedy cover of every token's experts uses."""
    options = held[ids]
    if (held.sum(axis=1) == 1).all():
        return np.asarray(options.any(axis=1))
    used = np.zeros((len(ids), held.shape[1]), np.bool_)
    if (held.sum(axis=0) == 1).all():
        # No device has two of a token's experts: the cover takes each on its lowest device.
        np.put_along_axis(used, held.argmax(axis=1)[ids], True, 1)
        return used
    open_ = np.ones(ids.shape, np.bool_)
    while open_.any():
        tokens = np.flatnonzero(open_.any(axis=1))
        gains = (options[tokens] & open_[tokens][:, :, None]).sum(axis=1)
        best = np.argmax(gains, axis=1)
        used[tokens, best] = True
        open_[tokens] &= ~options[tokens, :, best]
    return used


def copies_between(used: Mask, homes: NDArray[np.int64] | None, devices_per_node: int) -> Floats:
    """[devices, devices]: copies of a token sent from row to column, mean over tokens.

    used: [tokens, devices]. homes: [tokens], None: every device alike, the exact mean. A token is sent once to each
    device of its home's node and once to each other node, to the device of its home's local rank, which forwards it
    inside (DeepEP, github.com/deepseek-ai/DeepEP). The diagonal is 0.
    """
    tokens, devices = used.shape
    by_node: Mask = np.asarray(used.reshape(tokens, -1, devices_per_node).any(axis=2))
    if homes is None:
        to_device = np.tile(used.mean(axis=0) / devices, (devices, 1))
        to_node = np.tile(by_node.mean(axis=0) / devices, (devices, 1))
    else:
        to_device = _summed_by_home(used, homes, devices) / tokens
        to_node = _summed_by_home(by_node, homes, devices) / tokens
    device = np.arange(devices)
    node, local = device // devices_per_node, device % devices_per_node
    relay = np.where(node[:, None] == node, device[:, None], node * devices_per_node + local[:, None])
    sent = np.zeros((devices, devices))
    np.add.at(sent, (relay, np.broadcast_to(device, relay.shape)), to_device)
    first_of_node = np.arange(0, devices, devices_per_node)
    np.add.at(sent, (np.broadcast_to(device[:, None], to_node.shape), relay[:, first_of_node]), to_node)
    np.fill_diagonal(sent, 0.0)
    return sent


def traffic_matrix(placement: Placement, routing: Routing) -> Floats:
    """[devices, devices]: copies of a token sent from row to column under `home`, mean over tokens and layers."""
    used = (reached(hosts(placement, i), routing.topk_ids[:, i]) for i in range(placement.layers))
    homes = token_homes(placement, routing)
    return np.asarray(
        sum(copies_between(mask, homes, placement.devices_per_node) for mask in used) / placement.layers
    )


def token_homes(placement: Placement, routing: Routing) -> NDArray[np.int64] | None:
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


def by_tier(sent: Floats, links: Links) -> dict[str, float]:
    """Copies over each tier but the device itself; `sent` as from copies_between."""
    summed = np.bincount(links.tier.ravel(), sent.ravel(), minlength=len(links.tiers))
    return dict(zip(links.tiers[1:], summed[1:].tolist(), strict=True))


def _summed_by_home(reach: Mask, homes: NDArray[np.int64], devices: int) -> Floats:
    """[devices, columns]: how many tokens of each home reach each column."""
    at_home = homes[:, None] == np.arange(devices)
    return np.asarray(at_home.T.astype(np.float32) @ reach.astype(np.float32), np.float64)
