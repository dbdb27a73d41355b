"""Balance for online use: all layers at once in NumPy, fractions of a second for 58 layers x 256 experts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.balance import Floats, Ints, LayerLoads
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.start import balanced_start


def fast_balance(
    loads: NDArray[np.float64],
    devices: int,
    slots_per_device: int,
    *,
    devices_per_node: int | None = None,
    time_limit_s: float = 0.2,
) -> Placement:
    """A placement balanced under every workload: replicate the heaviest, pack, then swap off the fullest device.

    loads: [layers, experts] or [workloads, layers, experts], counts or shares; a workload counts alike whatever its
    sum. Replication and packing follow DeepSeek's EPLB (global policy); the swaps run until the fullest device of no
    layer gains from one, or for time_limit_s seconds. Raises InputError where experts do not fit or a load is no
    number of 0 or more.
    """
    started = time.monotonic()
    shares = _shares(loads, devices, slots_per_device)
    packed = _balanced(shares, devices, slots_per_device, started + time_limit_s)
    return Placement(
        physical_to_logical=packed.rows().astype(np.int32),
        devices=devices,
        devices_per_node=devices_per_node or devices,
        slots_per_device=slots_per_device,
        num_experts=shares.shape[2],
    )


def fast_start(tables: list[LayerLoads], slots_per_device: int, deadline: float) -> list[tuple[Ints, Ints]]:
    """The expert and the device of every unit, sorted by expert, a pair for each layer; deadline: of time.monotonic.

    Balanced under the worst row of the tables; under their mixture where the rows are batches, as many are noise.
    """
    rows = [t.loads if t.rule != "cvar" else (t.shares @ t.loads)[None] for t in tables]
    packed = _balanced(np.stack(rows, axis=1), tables[0].devices, slots_per_device, deadline)
    return list(zip(packed.experts, packed.device_of, strict=True))


def _balanced(shares: Floats, devices: int, width: int, deadline: float) -> _Packed:
    """shares: [workloads, layers, experts] in units of the mean device load."""
    experts = _replicate(shares.max(axis=0), devices * width, devices)
    replicas = np.stack([np.bincount(row, minlength=shares.shape[2]) for row in experts])
    unit = np.take_along_axis(shares / replicas, np.broadcast_to(experts, (len(shares), *experts.shape)), 2)
    packed = _pack(unit, experts, devices, width)
    packed.improve(deadline)
    return packed


def _shares(loads: NDArray[np.float64], devices: int, width: int) -> Floats:
    """[workloads, layers, experts] in units of the mean device load; a layer without load counts as even."""
    table = np.asarray(loads, np.float64)
    table = table[None] if table.ndim == 2 else table
    if table.ndim != 3 or 0 in table.shape or not (np.isfinite(table).all() and (table >= 0).all()):
        raise InputError(
            f"loads of shape {list(np.shape(loads))} are not counts of experts",
            where="placement",
            hint="give numbers of 0 or more as [layers, experts] or [workloads, layers, experts]",
        )
    experts = table.shape[2]
    if not 0 < width <= experts <= devices * width:
        raise InputError(
            f"{devices} devices x {width} slots cannot hold {experts} experts without holding one twice on a device",
            where="placement",
            hint=f"slots_per_device must be from {-(-experts // max(1, devices))} to {experts}",
        )
    table = np.where(table.sum(axis=2, keepdims=True) > 0, table, 1.0)
    return np.asarray(table / table.sum(axis=2, keepdims=True) * devices, np.float64)


def _replicate(loads: Floats, slots: int, devices: int) -> Ints:
    """The expert of every unit, [layers, slots], sorted: each spare slot goes to the expert heaviest per replica."""
    layers, experts = loads.shape
    replicas, every = np.ones((layers, experts), np.int64), np.arange(layers)
    per_replica = loads.copy()
    for _ in range(slots - experts):
        heaviest = per_replica.argmax(axis=1)
        replicas[every, heaviest] += 1
        count = replicas[every, heaviest]
        per_replica[every, heaviest] = np.where(count < devices, loads[every, heaviest] / count, -1.0)
    return np.repeat(np.tile(np.arange(experts), layers), replicas.ravel()).reshape(layers, slots)


def _pack(unit: Floats, experts: Ints, devices: int, width: int) -> _Packed:
    """Units in falling load, each to the device that is then least loaded, among those with a slot and without it.

    unit: [workloads, layers, units]. Where an expert finds no device that way, balanced_start packs
    the layer, which never fails.
    """
    layers, units = experts.shape
    every = np.arange(layers)
    sums = np.zeros((len(unit), layers, devices))
    held = np.zeros((layers, devices, int(experts.max()) + 1), np.bool_)
    free, device_of = np.full((layers, devices), width), np.full((layers, units), -1)
    stuck = np.zeros(layers, np.bool_)
    for column in np.argsort(-unit.max(axis=0), axis=1, kind="stable").T:
        expert, load = experts[every, column], unit[:, every, column]
        closed = (free == 0) | held[every, :, expert]
        device = np.where(closed, np.inf, (sums + load[:, :, None]).max(axis=0)).argmin(axis=1)
        stuck |= closed[every, device]
        sums[:, every, device] += load
        held[every, device, expert] = True
        free[every, device] -= 1
        device_of[every, column] = device
    for layer in np.flatnonzero(stuck):
        table = _table(unit[:, layer], experts[layer], devices)
        device_of[layer] = balanced_start(table, experts[layer], width)
    return _Packed(unit=unit, experts=experts, device_of=device_of, devices=devices)


def _table(unit: Floats, experts: Ints, devices: int) -> LayerLoads:
    loads = np.array([np.bincount(experts, row) for row in unit], np.float64)
    return LayerLoads(loads=loads, shares=np.full(len(unit), 1 / len(unit)), devices=devices)


@dataclass(kw_only=True)
class _Packed:
    """unit: [workloads, layers, units] loads; experts, device_of: [layers, units]."""

    unit: Floats
    experts: Ints
    device_of: Ints
    devices: int

    def rows(self) -> Ints:
        """[layers, slots]: the expert of every slot, a device's in rising order."""
        key = self.device_of * (int(self.experts.max()) + 1) + self.experts
        return np.asarray(np.take_along_axis(self.experts, np.argsort(key, axis=1), 1))

    def improve(self, deadline: float) -> None:
        """Of every layer that still gains, swap a unit of the fullest device for the one that leaves both lowest."""
        layers = np.arange(len(self.experts))
        held, sums = self._held(), self._sums()
        while len(layers) and time.monotonic() < deadline:
            full = sums[:, layers].max(axis=0).argmax(axis=1)
            peak = sums[:, layers, full].max(axis=0)
            inside = np.argsort(self.device_of[layers] != full[:, None], axis=1, kind="stable")
            inside = inside[:, : self.experts.shape[1] // self.devices]
            u, v, after = self._best_swap(layers, full, inside, held, sums)
            gains = after < peak - 1e-12
            layers, u, v = layers[gains], u[gains], v[gains]
            self._swap(layers, u, v, held, sums)

    def _best_swap(
        self, layers: Ints, full: Ints, inside: Ints, held: NDArray[np.bool_], sums: Floats
    ) -> tuple[Ints, Ints, Floats]:
        """The units, and the higher load of the two devices then. inside: the units of the fullest one."""
        pick, there = np.arange(len(layers)), self.device_of[layers]
        mine, theirs = self.unit[:, layers[:, None], inside], self.unit[:, layers]
        change = theirs[:, :, None, :] - mine[:, :, :, None]
        at_full = sums[:, layers, full][:, :, None, None] + change
        at_other = sums[:, layers[:, None], there][:, :, None, :] - change
        after = np.maximum(at_full, at_other).max(axis=0)
        blocked = (there == full[:, None]) | held[layers[:, None], full[:, None], self.experts[layers]]
        expert = np.take_along_axis(self.experts[layers], inside, 1)
        clash = held[layers[:, None, None], there[:, None, :], expert[:, :, None]]
        after[clash | blocked[:, None, :]] = np.inf
        flat = after.reshape(len(layers), -1)
        best = flat.argmin(axis=1)
        row, v = np.divmod(best, after.shape[2])
        return inside[pick, row], v, flat[pick, best]

    def _swap(self, layers: Ints, u: Ints, v: Ints, held: NDArray[np.bool_], sums: Floats) -> None:
        a, b = self.device_of[layers, u], self.device_of[layers, v]
        change = self.unit[:, layers, v] - self.unit[:, layers, u]
        sums[:, layers, a] += change
        sums[:, layers, b] -= change
        held[layers, a, self.experts[layers, u]] = held[layers, b, self.experts[layers, v]] = False
        held[layers, b, self.experts[layers, u]] = held[layers, a, self.experts[layers, v]] = True
        self.device_of[layers, u], self.device_of[layers, v] = b, a

    def _held(self) -> NDArray[np.bool_]:
        """[layers, devices, experts]: which devices hold the expert."""
        held = np.zeros((len(self.experts), self.devices, int(self.experts.max()) + 1), np.bool_)
        held[np.arange(len(self.experts))[:, None], self.device_of, self.experts] = True
        return held

    def _sums(self) -> Floats:
        """[workloads, layers, devices]"""
        layers = len(self.experts)
        flat = (np.arange(layers)[:, None] * self.devices + self.device_of).ravel()
        sums = [np.bincount(flat, row.ravel(), minlength=layers * self.devices) for row in self.unit]
        return np.asarray(np.stack(sums).reshape(-1, layers, self.devices))
