"""Lower bounds on the imbalance of a layer: what no placement can go below."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, LayerLoads
from moecc.solvers.placement.start import replicate


def lower_bound(table: LayerLoads, slots_per_device: int) -> float:
    """No placement's imbalance of this layer is below this, in units of the mean device load (so at least 1).

    Every row's own bound holds under any placement, and the imbalance never falls when a row's rises. The bound of
    the rows' mixture holds too, as a maximum is convex (Jensen) and no rule is below the mean.
    """
    even = table.near is None
    rows = np.array([_row_bound(row, table.devices, slots_per_device, even) for row in table.loads])
    mixture = _row_bound(table.shares @ table.loads, table.devices, slots_per_device, even)
    return max(float(table.combine(rows)), mixture)


def _row_bound(loads: Floats, devices: int, width: int, even: bool) -> float:
    """loads: [experts], summing to the number of devices; even: replicas serve alike."""
    spare = devices * width - len(loads)
    if spare:
        return max(1.0, _replicated(loads, devices, width, spare, even))
    return max(1.0, _crowded(loads, devices, width))


def _crowded(loads: Floats, devices: int, width: int) -> float:
    """Without replicas: of the j * devices + 1 heaviest experts some device holds j + 1, and width - j - 1 others.

    The pigeonhole bound of multiway partitioning, with the cardinality added.
    """
    heavy = np.sort(loads)[::-1]
    lightest = np.append(0.0, np.cumsum(heavy[::-1]))
    return max(
        float(heavy[j * devices - j : j * devices + 1].sum() + lightest[width - j - 1]) for j in range(width)
    )


def _replicated(loads: Floats, devices: int, width: int, spare: int, even: bool) -> float:
    """With replicas: the heaviest replica is least where each spare slot goes to the heaviest (an exchange argument);
    its device holds width - 1 other experts, each cut into at most min(devices, spare + 1) parts. Where parts are not
    alike some replica is at least as heavy as their mean, but the others may serve nothing."""
    replicas = np.bincount(replicate(loads, devices * width, devices))
    others = np.sort(loads)[: width - 1].sum() / min(devices, spare + 1) if even else 0.0
    return float((loads / replicas).max() + others)
