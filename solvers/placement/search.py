"""Tabu search over swaps of two units of one layer: all swaps are priced at once, the best allowed one is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads
from moecc.solvers.placement.served import loads_of
from moecc.solvers.placement.traffic import SwapTable, TrafficRows

Mask = NDArray[np.bool_]
TOLERANCE = 1e-12
FIRST_LOOK = 64
"""Swaps whose loads are priced first in a step."""


@dataclass(kw_only=True)
class Clock:
    """Wall time of a solve; `cut` stays true once a search had to stop for it."""

    deadline: float
    cut: bool = False
    started: float = field(default_factory=time.monotonic)

    def passed(self, deadline: float) -> bool:
        late = time.monotonic() >= min(deadline, self.deadline)
        self.cut |= late
        return late

    def slice(self, parts_left: int) -> float:
        """The moment until which the next of `parts_left` parts may run: twice its share, as most end by themselves."""
        now = time.monotonic()
        return now + max(0.0, self.deadline - now) / max(1.0, parts_left / 2)


@dataclass(frozen=True, kw_only=True)
class Found:
    """device_of: [units]; cost: the objective of the search; imbalance: of the layer."""

    device_of: Ints
    cost: float
    imbalance: float


class Tabu:
    """A unit that left a device may not return for a random number of steps (Taillard's robust tabu search, 1991)."""

    def __init__(self, units: int, devices: int, rng: np.random.Generator) -> None:
        self.until = np.zeros((units, devices), np.int64)
        self.low, self.high = max(2, units // 10), max(4, units // 4)
        self.rng = rng

    def forbidden(self, units: Ints, device_of: Ints, step: int) -> Mask:
        """[len(units), all units]: swaps that would bring both units back too early."""
        held = self.until > step
        both: Mask = np.logical_and(held[units][:, device_of], held[:, device_of[units]].T)
        return both

    def leave(self, u: int, v: int, a: int, b: int, step: int) -> None:
        self.until[u, a] = step + self.rng.integers(self.low, self.high)
        self.until[v, b] = step + self.rng.integers(self.low, self.high)


def same_device(experts: Ints, device_of: Ints, units: Ints, devices: int) -> Mask:
    """[len(units), all units]: swaps that change nothing or would put two replicas on one device."""
    same: Mask = device_of[units][:, None] == device_of[None, :]
    if experts[-1] + 1 == len(experts):
        return same
    held = np.zeros((int(experts.max()) + 1, devices), np.bool_)
    held[experts, device_of] = True
    return np.asarray(same | held[experts[units]][:, device_of] | held[experts][:, device_of[units]].T)


def lowest(score: Floats, blocked: Mask) -> tuple[int, int] | None:
    """The open entry of the lowest score, the first of equal ones; None if all are blocked."""
    open_ = np.where(blocked, np.inf, score)
    row, column = divmod(int(open_.argmin()), score.shape[1])
    return (row, column) if np.isfinite(open_[row, column]) else None


def excess(loads: DeviceLoads, device_of: Ints, cap: float) -> Floats:
    """How far every swap of two units ends up over the cap, [units, units]; a single 0 if there is no cap."""
    if np.isinf(cap):
        return np.zeros((1, 1))
    every = np.arange(len(device_of))
    after = loads.after_swaps(every[:, None], every[None, :], device_of)
    return np.maximum(after - cap, 0.0)


def _cheapest(
    change: Floats, price: float, cap: float, loads: DeviceLoads, device_of: Ints, blocked: Mask, tabu: Mask
) -> tuple[int, int] | None:
    """The open swap of the lowest change + price * excess over the cap; one that is tabu only if within the cap.

    change, blocked, tabu: [units, units], symmetric. The excess is never negative, so swaps are weighed in the order
    of their change until none that is left can be lower: most steps price the loads of a few swaps only.
    """
    flat = np.where(np.logical_or(blocked, np.tri(len(change), dtype=np.bool_)), np.inf, change).ravel()
    if np.isinf(cap):
        return lowest(flat.reshape(change.shape), blocked)
    count, open_ = FIRST_LOOK, int(np.isfinite(flat).sum())
    while open_:
        count = min(count, open_)
        near = np.sort(np.argpartition(flat, count - 1)[:count])
        us, vs = np.divmod(near, len(change))
        over = np.maximum(loads.after_swaps(us, vs, device_of) - cap, 0.0)
        score = np.where(tabu[us, vs] & (over > TOLERANCE), np.inf, flat[near] + price * over)
        best = int(score.argmin())
        if count == open_ or score[best] <= flat[near].max():
            return (int(us[best]), int(vs[best])) if np.isfinite(score[best]) else None
        count *= 16
    return None


def balance_layer(
    table: LayerLoads,
    experts: Ints,
    device_of: Ints,
    *,
    floor: float,
    rng: np.random.Generator,
    clock: Clock,
    until: float,
) -> Found:
    """Lower the imbalance of a layer; stops at `floor`, after a fixed number of idle steps, or at the clock."""
    device_of = device_of.copy()
    loads = loads_of(table, experts, device_of)
    units, tabu = len(experts), Tabu(len(experts), table.devices, rng)
    everyone = np.arange(units)
    best, best_devices, idle, step = loads.imbalance, device_of.copy(), 0, 0
    while best > floor + TOLERANCE and idle < 4 * units + 40 and not clock.passed(until):
        step += 1
        # Only a swap with a fullest device can lower the maximum.
        rows = np.flatnonzero(loads.fullest()[device_of])
        pairs = rows[:, None], everyone[None, :]
        after, squares = loads.after_swaps(*pairs, device_of), loads.square_changes(*pairs, device_of)
        blocked = same_device(experts, device_of, rows, table.devices)
        blocked |= tabu.forbidden(rows, device_of, step) & (after >= best - TOLERANCE)
        # Many swaps leave the maximum as it is; the squares then prefer the one that evens out the other devices.
        picked = lowest(after + 0.02 * squares, blocked)
        idle += 1
        if picked is None:
            tabu.until[:] = 0
            continue
        u, v = int(rows[picked[0]]), picked[1]
        a, b = int(device_of[u]), int(device_of[v])
        loads.swap(u, v, a, b)
        device_of[u], device_of[v] = b, a
        tabu.leave(u, v, a, b, step)
        if loads.imbalance < best - TOLERANCE:
            best, best_devices, idle = loads.imbalance, device_of.copy(), 0
    return Found(device_of=best_devices, cost=best, imbalance=best)


class Swaps(Protocol):
    """What every swap of two units of a layer would do to a cost, kept up to date while swaps are applied.

    device_of: [units + 1], the last entry the padding device.
    """

    device_of: Ints

    @property
    def cost(self) -> float: ...

    def changes(self) -> Floats:
        """[units, units]; entries of pairs on one device mean nothing."""
        ...

    def swap(self, u: int, v: int) -> None: ...


def reduce_traffic(
    rows: TrafficRows,
    table: LayerLoads,
    device_of: Ints,
    *,
    cap: float,
    budget: int,
    rng: np.random.Generator,
    clock: Clock,
    until: float,
) -> Found | None:
    """Lower the traffic of a layer by at most `budget` swaps; None if no assignment within `cap` was met."""
    swaps = SwapTable(rows, device_of)
    return reduce_cost(swaps, rows.experts, table, cap=cap, budget=budget, rng=rng, clock=clock, until=until)


def reduce_cost(
    swaps: Swaps,
    experts: Ints,
    table: LayerLoads,
    *,
    cap: float,
    budget: int,
    rng: np.random.Generator,
    clock: Clock,
    until: float,
) -> Found | None:
    """Lower a cost of a layer by at most `budget` swaps; None if no assignment within `cap` was met.

    Swaps beyond the cap are allowed at a price that rises while the search is over the cap and falls while it is
    within, so that it walks along the border.
    """
    units = len(experts)
    loads = loads_of(table, experts, swaps.device_of[:-1])
    tabu, everyone, price, idle = Tabu(units, table.devices, rng), np.arange(units), 10.0, 0
    best: Found | None = None
    for step in range(budget + 1):
        if loads.imbalance <= cap + TOLERANCE and (best is None or swaps.cost < best.cost - TOLERANCE):
            best = Found(device_of=swaps.device_of[:-1].copy(), cost=swaps.cost, imbalance=loads.imbalance)
            idle = 0
        if step == budget or idle > budget // 3 or clock.passed(until):
            break
        idle += 1
        device_of = swaps.device_of[:-1]
        change = swaps.changes()
        price = min(price * 1.1, 1e3) if loads.imbalance > cap + TOLERANCE else max(price / 1.1, 0.5)
        goal = swaps.cost + change >= (best.cost if best else np.inf) - TOLERANCE
        held = tabu.forbidden(everyone, device_of, step)
        blocked = same_device(experts, device_of, everyone, table.devices) | (held & goal)
        picked = _cheapest(change, price, cap, loads, device_of, blocked, held)
        if picked is None:
            tabu.until[:] = 0
            continue
        u, v = picked
        a, b = int(device_of[u]), int(device_of[v])
        swaps.swap(u, v)
        loads.swap(u, v, a, b)
        tabu.leave(u, v, a, b, step)
    return best
