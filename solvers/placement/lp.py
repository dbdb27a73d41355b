"""Device loads where an LP splits every expert's load over its replicas so that the fullest device is emptiest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads

Mask = NDArray[np.bool_]


class LpDeviceLoads(DeviceLoads):
    """As DeviceLoads, but the peak is the LP's: over all sets of devices, the most that only they can serve per device
    of the set (max-flow min-cut). `sums` stay those of the even split, which decide between swaps of equal peak."""

    def __init__(self, table: LayerLoads, experts: Ints, device_of: Ints) -> None:
        super().__init__(table, experts, device_of)
        self.experts = experts
        self.holders = np.zeros(table.loads.shape[1], np.int64)
        np.bitwise_or.at(self.holders, experts, 1 << device_of)
        self.closed = closed_loads(table.loads, self.holders[None], self.devices)[:, 0]

    @property
    def peaks(self) -> Floats:
        return np.asarray((self.closed / _sizes(self.devices)).max(axis=1))

    def fullest(self) -> Mask:
        """[devices]: those of the sets that the peaks come from."""
        peaks, full = self.peaks, self.closed / _sizes(self.devices)
        tight = (full >= peaks[:, None] - 1e-12)[self.table.decisive(peaks)].any(axis=0)
        members = np.arange(1 << self.devices)[tight, None] >> np.arange(self.devices) & 1
        return np.asarray(members.any(axis=0))

    def swap(self, u: int, v: int, a: int, b: int) -> None:
        super().swap(u, v, a, b)
        for unit, source, target in ((u, a, b), (v, b, a)):
            expert = int(self.experts[unit])
            held = self.holders[expert]
            moved = held & ~(1 << source) | 1 << target
            change = (
                _inside(np.array([moved]), self.devices)[0] * 1.0 - _inside(np.array([held]), self.devices)[0]
            )
            self.closed = self.closed + self.table.loads[:, expert, None] * change
            self.holders[expert] = moved

    def after_swaps(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        us, vs = np.broadcast_arrays(us, vs)
        a, b = device_of[us.ravel()], device_of[vs.ravel()]
        closed = self.closed[:, None] + self._moved(us.ravel(), a, b) + self._moved(vs.ravel(), b, a)
        peaks = (closed / _sizes(self.devices)).max(axis=2)
        return self.table.combine(peaks.reshape(len(peaks), *us.shape))

    def _moved(self, units: Ints, source: Ints, target: Ints) -> Floats:
        """[rows, moves, sets]: the change of what only a set can serve, if units went from source to target."""
        experts = self.experts[units]
        held = self.holders[experts]
        moved = held & ~(1 << source) | 1 << target
        change = _inside(moved, self.devices).astype(np.float64) - _inside(held, self.devices)
        return np.asarray(self.table.loads[:, experts, None] * change)


def closed_loads(loads: Floats, holders: Ints, devices: int) -> Floats:
    """[rows, placements, sets]: what only each set of devices can serve; holders: [placements, experts], bit d set if
    device d holds the expert."""
    inside = _inside(holders, devices)
    return np.asarray(np.einsum("re,pes->rps", loads, inside, optimize=True))


def lp_peaks(loads: Floats, holders: Ints, devices: int) -> Floats:
    """[rows, placements]: the fullest device's load."""
    return np.asarray((closed_loads(loads, holders, devices) / _sizes(devices)).max(axis=2))


def _inside(holders: Ints, devices: int) -> Mask:
    """[..., sets]: whether all holders are in the set."""
    return np.asarray(holders[..., None] & ~np.arange(1 << devices) == 0)


def _sizes(devices: int) -> Floats:
    """[sets]: how many devices a set has; the empty set, which serves nothing, counts as one."""
    members = np.arange(1 << devices)[:, None] >> np.arange(devices) & 1
    return np.asarray(np.maximum(1, members.sum(axis=1)), np.float64)
