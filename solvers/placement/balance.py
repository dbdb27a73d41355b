"""Device loads of one layer: imbalance, the imbalance after every swap, and lower bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.batches import BATCHES, draw_batches
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.routing import Routing

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rule = Literal["mean", "worst", "cvar"]


@dataclass(frozen=True, kw_only=True)
class NearLoads:
    """Where a layer's tokens are: loads [rows, experts] as in LayerLoads, or [rows, experts, devices] by home;
    without homes they are on every device alike."""

    loads: Floats
    devices: int
    devices_per_node: int

    def of(self, experts: Ints) -> Floats:
        """[rows, experts, devices]: the load of these experts from each home."""
        if self.loads.ndim == 3:
            return np.asarray(self.loads[:, experts])
        shape = (len(self.loads), len(experts), self.devices)
        return np.broadcast_to((self.loads[:, experts] / self.devices)[:, :, None], shape)


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """Expert loads of one layer in units of the mean device load: a row per workload or batch, or one if pooled.

    loads: [rows, experts], every row sums to the number of devices. shares: [rows], summing to 1.
    rule: how the rows' imbalances become one, their `mean` by shares, the `worst`, or the mean of the worst `tail`
    (`cvar`; Rockafellar and Uryasev, 2000: the row at the edge of the tail counts in part).
    near: where tokens are, if the nearest replica serves them. lp: whether an LP splits an expert's load over its
    replicas. Neither: evenly.
    """

    loads: Floats
    shares: Floats
    devices: int
    rule: Rule = "mean"
    tail: float = 1.0
    near: NearLoads | None = None
    lp: bool = False

    def per_unit(self, experts: Ints) -> Floats:
        """[rows, units]: the load of every replica; experts [units] is the expert each unit holds."""
        replicas = np.bincount(experts, minlength=self.loads.shape[1])
        return self.loads[:, experts] / replicas[experts]

    def combine(self, peaks: Floats) -> Floats:
        """The imbalance [...] from the rows' [rows, ...]; it never falls when a row's rises."""
        if self.rule == "worst":
            return np.asarray(peaks.max(axis=0), np.float64)
        if self.rule == "mean" or len(peaks) == 1:
            return np.asarray(np.tensordot(self.shares, peaks, 1), np.float64)
        if (self.shares == self.shares[0]).all():
            return _largest_mean(peaks, self.tail * len(peaks))
        order = np.argsort(-peaks, axis=0, kind="stable")
        weight = self.shares[order]
        before = np.cumsum(weight, axis=0) - weight
        counted = np.clip(self.tail - before, 0.0, weight)
        return np.asarray((counted * np.take_along_axis(peaks, order, 0)).sum(axis=0) / self.tail)

    def decisive(self, peaks: Floats) -> NDArray[np.bool_]:
        """[rows]: those that the imbalance depends on now; it cannot fall unless one of them does."""
        if self.rule == "mean" or len(peaks) == 1:
            return np.ones(len(peaks), np.bool_)
        if self.rule == "worst":
            return np.asarray(peaks >= peaks.max())
        order = np.argsort(-peaks, kind="stable")
        inside = np.cumsum(self.shares[order]) - self.shares[order] < self.tail
        return np.asarray(peaks >= peaks[order[inside]].min())


def _largest_mean(peaks: Floats, count: float) -> Floats:
    """[...]: the mean of the `count` largest of peaks [rows, ...], the last of them in part."""
    whole = min(int(count), len(peaks))
    at = max(0, len(peaks) - whole - 1)
    last = np.partition(peaks, at, axis=0)[at:]
    return np.asarray((last[len(last) - whole :].sum(axis=0) + (count - whole) * last[0]) / count)


def layer_loads(problem: PlacementProblem) -> list[LayerLoads]:
    """The load table of every layer under the problem's balance and dispatch."""
    batches, shares = _batches(problem)
    table = np.stack([routing.loads() for routing in batches])
    by_home = None
    if problem.near and problem.homed:
        by_home = np.stack([_loads_by_home(routing, problem.devices) for routing in batches])
    if problem.balance == "pooled":
        table = np.einsum("w,wle->le", shares, table)[None]
        by_home = None if by_home is None else np.tensordot(shares, by_home, 1)[None]
        shares = np.ones(1)
    rules: dict[str, Rule] = {"worst": "worst", "cvar": "cvar"}
    layers = []
    for layer in range(problem.layers):
        loads = table[:, layer] * problem.devices
        placed = loads if by_home is None else by_home[:, layer] * problem.devices
        near = NearLoads(loads=placed, devices=problem.devices, devices_per_node=problem.devices_per_node)
        layers.append(
            LayerLoads(
                loads=loads,
                shares=shares,
                devices=problem.devices,
                rule=rules.get(problem.balance, "mean"),
                tail=1 - problem.cvar_alpha,
                near=near if problem.near else None,
                lp=problem.lp,
            )
        )
    return layers


def _batches(problem: PlacementProblem) -> tuple[list[Routing], Floats]:
    """What the rows of the load table are drawn from, and their shares: workloads, or under `cvar` batches of them."""
    if problem.balance != "cvar":
        return list(problem.workloads), problem.shares
    options = {"count": BATCHES, "batch_tokens": problem.batch_tokens, "seed": problem.seed}
    batches = [w.take(tokens) for w in problem.workloads for tokens in draw_batches(w, **options)]
    return batches, np.repeat(problem.shares / BATCHES, BATCHES)


def _loads_by_home(routing: Routing, devices: int) -> Floats:
    """[layers, experts, devices]: the share of assignments that each expert receives from each home."""
    if routing.homes is None:
        return np.repeat(routing.loads()[:, :, None] / devices, devices, axis=2)
    experts, width = routing.num_experts, routing.topk_ids[:, 0].size
    homes = routing.homes.astype(np.int64)[:, None]
    return np.stack(
        [
            np.bincount((ids * devices + homes).ravel(), minlength=experts * devices).reshape(
                experts, devices
            )
            / width
            for ids in routing.topk_ids.astype(np.int64).transpose(1, 0, 2)
        ]
    )


class DeviceLoads:
    """Loads [rows, devices] under an assignment of units to devices, kept up to date while units are swapped."""

    def __init__(self, table: LayerLoads, experts: Ints, device_of: Ints) -> None:
        self.table, self.shares, self.devices = table, table.shares, table.devices
        self.unit = table.per_unit(experts)
        self.sums: Floats = np.array(
            [np.bincount(device_of, row, minlength=self.devices) for row in self.unit], np.float64
        )

    @property
    def peaks(self) -> Floats:
        """[rows]: the load of the fullest device."""
        return np.asarray(self.sums.max(axis=1))

    @property
    def imbalance(self) -> float:
        return float(self.table.combine(self.peaks))

    def fullest(self) -> NDArray[np.bool_]:
        """[devices]: where the imbalance comes from; only a swap with one of them can lower it."""
        peaks = self.sums.max(axis=1)
        rows = self.sums[self.table.decisive(peaks)]
        return np.asarray((rows >= rows.max(axis=1, keepdims=True)).any(axis=0))

    def swap(self, u: int, v: int, a: int, b: int) -> None:
        """Exchange unit u of device a with unit v of device b."""
        change = self.unit[:, v] - self.unit[:, u]
        self.sums[:, a] += change
        self.sums[:, b] -= change

    def after_swaps(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        """The imbalance after swapping us with vs, of as many dimensions, which broadcast against each other.

        Entries of pairs on one device mean nothing.
        """
        a, b = device_of[us], device_of[vs]
        change = self.unit[:, vs] - self.unit[:, us]
        moved = np.maximum(self.sums[:, a] + change, self.sums[:, b] - change)
        return self.table.combine(np.maximum(moved, self._others(a, b)))

    def square_changes(self, us: Ints, vs: Ints, device_of: Ints) -> Floats:
        """Half the weighted change of the sum of squared loads after swapping us with vs, as in after_swaps."""
        change = self.unit[:, vs] - self.unit[:, us]
        squares = change * (self.sums[:, device_of[us]] - self.sums[:, device_of[vs]] + change)
        return np.asarray(np.tensordot(self.shares, squares, 1))

    def _others(self, a: Ints, b: Ints) -> Floats:
        """[rows, ...]: the largest load of the devices other than a and b."""
        padded = np.concatenate([self.sums, np.full((len(self.sums), 2), -np.inf)], axis=1)
        order = np.argsort(-padded, axis=1, kind="stable")[:, :3]
        shape = (-1,) + (1,) * np.broadcast(a, b).ndim
        first, second, third = (np.take_along_axis(padded, order[:, [i]], 1).reshape(shape) for i in range(3))
        hit_first, hit_second = (
            (a == at) | (b == at) for at in (order[:, 0].reshape(shape), order[:, 1].reshape(shape))
        )
        return np.where(~hit_first, first, np.where(~hit_second, second, third))
