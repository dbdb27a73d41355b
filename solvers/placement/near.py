"""Device loads where a token is served by the nearest replica: what one serves depends on where the others are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads, NearLoads

Mask = NDArray[np.bool_]


class NearDeviceLoads(DeviceLoads):
    """As DeviceLoads, but with SGLang's static dispatch: the home device's replica, else those of its node alike, else
    all alike. A swap moves loads between the devices of all replicas of both experts."""

    def __init__(self, table: LayerLoads, near: NearLoads, experts: Ints, device_of: Ints) -> None:
        self.table, self.near, self.experts, self.devices = table, near, experts, table.devices
        self.shares = table.shares
        self.held = np.zeros((table.loads.shape[1], self.devices), np.bool_)
        self.held[experts, device_of] = True
        self.sums = served(self.near, np.arange(len(self.held)), self.held).sum(axis=1)

    def swap(self, u: int, v: int, a: int, b: int) -> None:
        pair = self.experts[[u, v]]
        self.sums = self.sums - served(self.near, pair, self.held[pair]).sum(axis=1)
        self.held[pair, [a, b]], self.held[pair, [b, a]] = False, True
        self.sums = self.sums + served(self.near, pair, self.held[pair]).sum(axis=1)

    def after_swaps(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        return self.table.combine(self._after(us, vs, device_of).max(axis=-1))

    def square_changes(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        squares = (self._after(us, vs, device_of) ** 2).sum(axis=-1)
        before = (self.sums**2).sum(axis=1).reshape(-1, *(1,) * (squares.ndim - 1))
        return np.asarray(np.tensordot(self.shares, squares - before, 1) / 2)

    def _after(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        """[rows, ..., devices]: the loads after swapping us with vs."""
        us, vs = np.broadcast_arrays(us, vs)
        change = self._moved(us.ravel(), device_of[vs].ravel(), device_of)
        change = change + self._moved(vs.ravel(), device_of[us].ravel(), device_of)
        return (self.sums[:, None] + change).reshape(len(self.sums), *us.shape, self.devices)

    def _moved(self, units: Ints, to: Ints, device_of: Ints) -> Floats:
        """[rows, moves, devices]: the change if units[i] alone went to device to[i]."""
        keys, back = np.unique(units * self.devices + to, return_inverse=True)
        units, to = keys // self.devices, keys % self.devices
        experts = self.experts[units]
        held = self.held[experts]
        index = np.arange(len(units))
        held[index, device_of[units]] = False
        held[index, to] = True
        change = served(self.near, experts, held) - served(self.near, experts, self.held[experts])
        return change[:, back.ravel()]


def served(near: NearLoads, experts: Ints, held: Mask) -> Floats:
    """[rows, experts, devices]: the load that each device serves of these experts, held: [experts, devices]."""
    from_home = near.of(experts)
    nodes = near.devices // near.devices_per_node
    shape = (len(experts), nodes, -1)
    of_node = held.reshape(shape).sum(axis=2)
    unserved = (from_home * ~held).reshape(len(from_home), *shape).sum(axis=3)
    inside = np.where(of_node > 0, unserved / np.maximum(1, of_node), 0.0)
    outside = np.where(of_node > 0, 0.0, unserved).sum(axis=2) / held.sum(axis=1)
    each = np.repeat(inside, near.devices_per_node, axis=2) + outside[:, :, None]
    return np.asarray(held * (from_home + each))
