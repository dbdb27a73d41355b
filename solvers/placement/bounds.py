"""Lower bounds on the imbalance of a layer: what no placement can go below."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, LayerLoads


def lower_bound(table: LayerLoads, slots_per_device: int) -> float:
    """No placement's imbalance of this layer is below this, in units of the mean device load (so at least 1).

    Every row's own bound holds under any placement, and the imbalance never falls when a row's rises. The bound of
    the rows' mixture holds too, as a maximum is convex (Jensen) and no rule is below the mean.
    """
    rows = np.vstack([table.loads, table.shares @ table.loads])
    if table.devices * slots_per_device > rows.shape[1]:
        bounds = _replicated(rows, table.devices, slots_per_device, even=table.near is None and not table.lp)
    else:
        bounds = np.array([_crowded(row, table.devices, slots_per_device) for row in rows])
    bounds = np.maximum(1.0, bounds)
    return max(float(table.combine(bounds[:-1])), float(bounds[-1]))


def _crowded(loads: Floats, devices: int, width: int) -> float:
    """Without replicas: of the j * devices + 1 heaviest experts some device holds j + 1, and width - j - 1 others.

    The pigeonhole bound of multiway partitioning, with the cardinality added.
    """
    heavy = np.sort(loads)[::-1]
    lightest = np.append(0.0, np.cumsum(heavy[::-1]))
    return max(
        float(heavy[j * devices - j : j * devices + 1].sum() + lightest[width - j - 1]) for j in range(width)
    )


def _replicated(loads: Floats, devices: int, width: int, *, even: bool) -> Floats:
    """[rows] of loads [rows, experts], each summing to the number of devices; even: replicas serve alike.

    The heaviest replica is least where each spare slot goes to the heaviest (an exchange argument); its device holds
    width - 1 other experts, each cut into at most min(devices, spare + 1) parts. Where parts are not alike some
    replica is at least as heavy as their mean, but the others may serve nothing.
    """
    spare, row = devices * width - loads.shape[1], np.arange(len(loads))
    replicas, heaviest = np.ones(loads.shape), loads.copy()
    for _ in range(spare):
        at = heaviest.argmax(axis=1)
        replicas[row, at] += 1
        count = replicas[row, at]
        heaviest[row, at] = np.where(count < devices, loads[row, at] / count, -1.0)
    others = np.sort(loads, axis=1)[:, : width - 1].sum(axis=1) / min(devices, spare + 1) if even else 0.0
    return np.asarray((loads / replicas).max(axis=1) + others)
