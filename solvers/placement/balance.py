"""Device loads of one layer: imbalance, the imbalance after every swap, and lower bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.problem import PlacementProblem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """Expert loads of one layer, one row per workload (a single row if pooled), in units of the mean device load.

    loads: [rows, experts], every row sums to the number of devices. shares: [rows], summing to 1.
    """

    loads: Floats
    shares: Floats
    devices: int

    def per_unit(self, experts: Ints) -> Floats:
        """[rows, units]: the load of every replica; experts [units] is the expert each unit holds."""
        replicas = np.bincount(experts, minlength=self.loads.shape[1])
        return self.loads[:, experts] / replicas[experts]

    def lower_bound(self, slots_per_device: int) -> float:
        """No placement's imbalance is below this.

        The mean is 1. An expert has at most min(devices, spare slots + 1) replicas, so one device carries at least
        that share of it; without spare slots its device also holds slots_per_device - 1 others, the lightest at best.
        """
        spare = self.devices * slots_per_device - self.loads.shape[1]
        bounds = []
        for row in self.loads:
            heaviest = row.max() / min(self.devices, spare + 1)
            rest = np.sort(row)[: slots_per_device - 1].sum() if spare == 0 else 0.0
            bounds.append(max(1.0, heaviest + rest))
        return float(self.shares @ np.array(bounds))


def layer_loads(problem: PlacementProblem) -> list[LayerLoads]:
    """The load table of every layer under the problem's balance."""
    table = np.stack([routing.loads() for routing in problem.workloads])
    shares = problem.shares
    if problem.balance == "pooled":
        table, shares = np.einsum("w,wle->le", shares, table)[None], np.ones(1)
    return [
        LayerLoads(loads=table[:, layer] * problem.devices, shares=shares, devices=problem.devices)
        for layer in range(problem.layers)
    ]


class DeviceLoads:
    """Loads [rows, devices] under an assignment of units to devices, kept up to date while units are swapped."""

    def __init__(self, table: LayerLoads, experts: Ints, device_of: Ints) -> None:
        self.shares, self.devices = table.shares, table.devices
        self.unit = table.per_unit(experts)
        self.sums: Floats = np.array(
            [np.bincount(device_of, row, minlength=self.devices) for row in self.unit], np.float64
        )

    @property
    def imbalance(self) -> float:
        return float(self.shares @ self.sums.max(axis=1))

    def swap(self, u: int, v: int, a: int, b: int) -> None:
        """Exchange unit u of device a with unit v of device b."""
        change = self.unit[:, v] - self.unit[:, u]
        self.sums[:, a] += change
        self.sums[:, b] -= change

    def after_swaps(self, units: Ints, device_of: Ints) -> tuple[Floats, Floats]:
        """Imbalance, and half the weighted change of the sum of squared loads, after swapping units[i] with any unit.

        Both [len(units), all units]; entries of pairs on one device mean nothing.
        """
        a = device_of[units]
        change = self.unit[:, None, :] - self.unit[:, units, None]
        at_a, at_b = self.sums[:, a][:, :, None] + change, self.sums[:, device_of][:, None, :] - change
        squares = change * (at_a - at_b - change)
        peak = np.maximum(np.maximum(at_a, at_b), self._others()[:, a[:, None], device_of[None, :]])
        return np.tensordot(self.shares, peak, 1), np.tensordot(self.shares, squares, 1)

    def _others(self) -> Floats:
        """[rows, a, b]: the largest load of the devices other than a and b."""
        rows, devices = self.sums.shape
        padded = np.concatenate([self.sums, np.full((rows, 2), -np.inf)], axis=1)
        order = np.argsort(-padded, axis=1)[:, :3]
        first, second, third = (np.take_along_axis(padded, order[:, [i]], 1)[:, :, None] for i in range(3))
        device = np.arange(devices)
        hit_first, hit_second = (
            (device == order[:, [i]])[:, :, None] | (device == order[:, [i]])[:, None, :] for i in range(2)
        )
        return np.where(~hit_first, first, np.where(~hit_second, second, third))
