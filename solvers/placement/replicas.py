"""Which experts have replicas: one of an expert gives its slot to one of another where traffic asks for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.search import TOLERANCE, reduce_traffic
from moecc.solvers.placement.traffic import HomeRows, home_rows

Mask = NDArray[np.bool_]

ROUNDS = 12
FRUITLESS = 4
"""Rounds without gain that end the search of a layer."""
CHANGES = 3
"""Most replicas that a round replaces."""
NOISE = 1e-3
"""Scale of the luck added to the prices of replacements, in shares of the layer's traffic: rounds differ by it."""
EXCESS = 1.0
"""Price of imbalance over the cap when replacements are compared."""
CANDIDATES = 32
"""Replicas of which replacements are priced, those cheapest to lose."""


def search_replicas(work: Work, index: int, turn: int, until: float) -> None:
    """Rounds of a few replacements, then swaps, on one layer under `home`; what is better and within the cap is kept.

    DeepSeek-V2-Lite's traces, 8 devices, 72 slots, cap 1.12 per workload, 2 s a layer: 2.992 devices per token where
    shaken swaps reached 2.997.
    """
    if work.problem.slots_per_device == 1:
        return
    fruitless = 0
    for round_ in range(ROUNDS):
        if fruitless == FRUITLESS or work.clock.passed(until):
            return
        fruitless = 0 if _improve(work, index, (turn, round_), until) else fruitless + 1


def _improve(work: Work, index: int, key: tuple[int, int], until: float) -> bool:
    layer, cap, rng = work.layers[index], float(work.caps[index]), work.rng(index, 31, *key)
    rows = now = home_rows(work.problem, index, layer.experts)
    device_of, cost = layer.device_of, now.cost(layer.device_of)
    for _ in range(1 + key[1] % CHANGES):
        changed = replace_replica(rows, layer.table, device_of, cap, rng)
        if changed is None:
            return False
        experts, device_of = changed
        rows = HomeRows(now.ids, now.weight, experts, now.devices)
    found = reduce_traffic(
        rows,
        layer.table,
        device_of,
        cap=cap,
        budget=5 * work.problem.slots,
        rng=rng,
        clock=work.clock,
        until=until,
    )
    within = layer.imbalance <= cap + TOLERANCE
    if found is None or (within and found.cost >= cost - TOLERANCE):
        return False
    layer.experts, layer.device_of = rows.experts, found.device_of
    return True


def replace_replica(
    rows: HomeRows, table: LayerLoads, device_of: Ints, cap: float, rng: np.random.Generator
) -> tuple[Ints, Ints] | None:
    """(experts, device_of) after the replacement of the least price, with some luck; None if there is none."""
    experts = rows.experts
    traffic, cost = traffic_changes(rows, device_of)
    spare = np.flatnonzero(np.isfinite(traffic).any(axis=1))
    if not len(spare):
        return None
    spare = np.sort(spare[np.argsort(traffic[spare].min(axis=1), kind="stable")][:CANDIDATES])
    over = np.maximum(imbalances(table, experts, device_of, spare) - cap, 0.0) if np.isfinite(cap) else 0.0
    price = traffic[spare] + EXCESS * over
    price += NOISE * cost * rng.gumbel(size=price.shape)
    row, expert = divmod(int(price.argmin()), price.shape[1])
    return replaced(experts, device_of, int(spare[row]), expert)


def replaced(experts: Ints, device_of: Ints, unit: int, expert: int) -> tuple[Ints, Ints]:
    """(experts, device_of) with the unit a replica of `expert`; units stay in the order of experts, then devices."""
    experts = experts.copy()
    experts[unit] = expert
    order = np.lexsort((device_of, experts))
    return experts[order], device_of[order]


def traffic_changes(rows: HomeRows, device_of: Ints) -> tuple[Floats, float]:
    """[units, experts]: about the change of the traffic if the unit were a replica of the expert, and the traffic.

    Infinite where the expert would lose its only unit, or the device holds the other already. Each row is taken to
    leave its other experts where they are: what it pays where the lost replica's next best is, what it saves where
    the new one spares it a device.
    """
    experts, devices = rows.experts, rows.devices
    look = rows.look(np.arange(len(rows.ids)), np.append(device_of, devices))
    moves, weight = look.moves[:, :, :devices], rows.weight[:, None]
    held = _held(experts, device_of, devices)
    other = held[experts[look.items]]
    np.put_along_axis(other, device_of[look.items][:, :, None], False, 2)
    next_best = np.where(other, moves, np.inf).min(axis=2)
    alone = held.sum(axis=1)[experts] == 1
    next_best[alone[look.items]] = 0.0
    loss = np.zeros(len(experts))
    np.add.at(loss, look.items, next_best * weight)
    cell = experts[look.items][:, :, None] * devices + np.arange(devices)
    saved = np.minimum(moves, 0.0) * weight[:, :, None]
    gain = np.bincount(cell.ravel(), saved.ravel(), minlength=held.size).reshape(held.shape)
    change = np.asarray(loss[:, None] + gain[:, device_of].T, np.float64)
    change[alone] = np.inf
    change[held[:, device_of].T] = np.inf
    return change, float(rows.weight @ look.cost)


def imbalances(table: LayerLoads, experts: Ints, device_of: Ints, units: Ints) -> Floats:
    """[len(units), experts]: the imbalance if the unit were a replica of the expert, replicas sharing evenly.

    The units' experts must have others, and their devices must not hold the expert."""
    held = _held(experts, device_of, table.devices)
    count = held.sum(axis=1)
    sums = DeviceLoads(table, experts, device_of).sums
    own, at = experts[units], device_of[units]
    here = np.eye(table.devices)[at]
    load = table.loads[:, own, None]
    lost = load * (
        (held[own] - here) / np.maximum(1, count[own] - 1)[:, None] - held[own] / count[own][:, None]
    )
    fewer = 1 / (count + 1) - 1 / count
    peaks = np.empty((len(table.loads), len(units), len(held)))
    for row, device in enumerate(at):
        base = sums + lost[:, row]
        after = base[:, None] + table.loads[:, :, None] * (held * fewer[:, None])
        after[:, :, device] += table.loads / (count + 1)
        peaks[:, row] = after.max(axis=2)
    return table.combine(peaks)


def _held(experts: Ints, device_of: Ints, devices: int) -> Mask:
    held = np.zeros((int(experts.max()) + 1, devices), np.bool_)
    held[experts, device_of] = True
    return held
