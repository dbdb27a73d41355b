"""Two devices of a layer shared out anew: all ways to split their units at once, the best one exactly.

Swaps exchange one unit for one; here any number changes sides. The split of up to UNITS units is solved by listing its
subsets, so the answer is optimal within that window, and within it alone.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.search import TOLERANCE, Clock, Found

UNITS = 16
"""Most units of a window: 12,870 ways to split them."""
IDLE = 7
"""Windows without gain, per device, that end a search."""


def share_out(work: Work, *, stop_at: float) -> None:
    """Lower the imbalance of every layer to `stop_at`, or as far as windows of two devices go.

    Replicas must share an expert's load evenly: where the nearest one serves, a unit has no load of its own.
    DeepSeek-V2-Lite's traces, 8 devices, 64 slots: swaps end 0.53% over the mean load, this 0.27% in as much time,
    and swaps from there 0.22%.
    """
    if work.problem.slots_per_device == 1 or work.problem.devices == 1 or work.problem.near:
        return
    total = len(work.layers)
    for index, layer in enumerate(work.layers):
        if work.clock.passed(np.inf):
            return
        found = even_pairs(
            layer.table,
            layer.experts,
            layer.device_of,
            floor=max(stop_at, lower_bound(layer.table, work.problem.slots_per_device)),
            rng=work.rng(index, 30),
            clock=work.clock,
            # Swaps follow and need as much.
            until=work.clock.slice(2 * total - index),
        )
        layer.device_of = found.device_of
        work.tick(index + 1, total)


def even_pairs(
    table: LayerLoads,
    experts: Ints,
    device_of: Ints,
    *,
    floor: float,
    rng: np.random.Generator,
    clock: Clock,
    until: float,
) -> Found:
    """Even out random pairs of devices until the imbalance is at `floor` or many windows in a row did not lower it.

    A window is split so that the squares of its loads are least: what evens out the pair is seldom what lowers the
    maximum at once, but it gives the next pair room. The best assignment met is returned, never one worse than given.
    """
    device_of = device_of.copy()
    loads = DeviceLoads(table, experts, device_of)
    best = Found(device_of=device_of.copy(), cost=loads.imbalance, imbalance=loads.imbalance)
    idle = 0
    while best.cost > floor + TOLERANCE and idle < IDLE * table.devices and not clock.passed(until):
        idle += 1
        a, b = (int(d) for d in rng.choice(table.devices, 2, replace=False))
        here, there = window(experts, device_of, a, b, UNITS, rng)
        if not _split(loads, device_of, here, there):
            continue
        if loads.imbalance < best.cost - TOLERANCE:
            best = Found(device_of=device_of.copy(), cost=loads.imbalance, imbalance=loads.imbalance)
            idle = 0
    return best


def window(
    experts: Ints, device_of: Ints, a: int, b: int, units: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Up to units / 2 of the units of a, and of b, drawn from those whose expert the other device does not hold."""
    on_a, on_b = np.flatnonzero(device_of == a), np.flatnonzero(device_of == b)
    free_a = on_a[~np.isin(experts[on_a], experts[on_b])]
    free_b = on_b[~np.isin(experts[on_b], experts[on_a])]
    return rng.permutation(free_a)[: units // 2], rng.permutation(free_b)[: units // 2]


@cache
def splits(left: int, right: int) -> Ints:
    """Bit sets, rising: the ways to choose `left` of left + right units; the lowest bits first."""
    every = np.arange(1 << (left + right))
    count = np.zeros(len(every), np.int8)
    for bit in range(left + right):
        count += (every >> bit & 1).astype(np.int8)
    return np.flatnonzero(count == left)


def subset_sums(values: Floats) -> Floats:
    """[2 ** units]: the sum of every bit set of values [units]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def square_changes(unit: Floats, shares: Floats, apart: Floats) -> Floats:
    """[2 ** units]: for every bit set of units on one of two devices, the others on the other, the squares of both
    loads, summed by `shares` over the rows, less those of the empty set.

    unit: [rows, units] loads; apart: [rows], the load of the one device less that of the other for the empty set. The
    squares of a set are a quadratic form of its bits, so that the rows count once, not for every set.
    """
    weighted = unit * shares[:, None]
    single, double = 2 * (apart @ weighted), 4 * (weighted.T @ unit)
    changes = np.zeros(1)
    for last in range(unit.shape[1]):
        alone = single[last] + double[last, last] / 2
        changes = np.concatenate([changes, changes + alone + subset_sums(double[:last, last])])
    return changes


def _split(loads: DeviceLoads, device_of: Ints, here: Ints, there: Ints) -> bool:
    """Split the units here (on one device) and there (on another) anew in place; False if no split is more even."""
    if not len(here) or not len(there):
        return False
    a, b = int(device_of[here[0]]), int(device_of[there[0]])
    units, ways = np.concatenate([here, there]), splits(len(here), len(there))
    unit = loads.unit[:, units]
    moved = unit[:, : len(here)].sum(axis=1)
    # With all of the units on b.
    left, right = loads.sums[:, a] - moved, loads.sums[:, b] + moved
    # The lowest bits alone are the split as it stands, the first of the ways.
    changes = square_changes(unit, loads.shares, left - right)[ways]
    best = int(changes.argmin())
    if changes[best] >= changes[0] - TOLERANCE:
        return False
    chosen = (ways[best] >> np.arange(len(units)) & 1).astype(bool)
    device_of[units] = np.where(chosen, a, b)
    change = unit[:, chosen].sum(axis=1)
    loads.sums[:, a], loads.sums[:, b] = left + change, right - change
    return True
