"""All placements of a small layer, for optima that are proven by looking at every one."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import Ints

MOST = 60_000
Holds = NDArray[np.bool_]


def all_layers(experts: int, devices: int, width: int) -> Holds | None:
    """Every way to fill devices with `width` distinct experts each so that all experts are held.

    [placements, experts, devices], or None if there may be more than MOST.
    """
    spare = devices * width > experts
    count = math.comb(experts, width) ** devices
    if not spare:
        count = math.factorial(experts) // math.factorial(width) ** devices
    if count > MOST:
        return None
    sets = list(itertools.combinations(range(experts), width))
    chosen = itertools.product(sets, repeat=devices) if spare else _partitions(sets, devices, frozenset())
    filled = np.array(list(chosen), np.int64)
    holds = np.zeros((len(filled), experts, devices), np.bool_)
    device = np.arange(devices)[None, :, None]
    holds[np.arange(len(filled))[:, None, None], filled, device] = True
    complete = np.asarray(holds.any(axis=2))
    return np.asarray(holds[complete.all(axis=1)])


def _partitions(
    sets: list[tuple[int, ...]], devices: int, used: frozenset[int]
) -> list[tuple[tuple[int, ...], ...]]:
    if devices == 0:
        return [()]
    return [
        (held, *rest)
        for held in sets
        if used.isdisjoint(held)
        for rest in _partitions(sets, devices - 1, used | set(held))
    ]


def cover(holds: Holds, ids: Ints) -> Holds:
    """[placements, sets, devices]: the devices that a greedy cover of each set uses, ties to the lowest device."""
    options = holds[:, ids]
    used = np.zeros((len(holds), len(ids), holds.shape[2]), np.bool_)
    open_ = np.ones(options.shape[:3], np.bool_)
    while open_.any():
        gain = (options & open_[..., None]).sum(axis=2)
        best = gain.argmax(axis=2)[..., None]
        left = np.asarray(open_.any(axis=2))[..., None]
        np.put_along_axis(used, best, np.take_along_axis(used, best, 2) | left, 2)
        open_ &= ~np.take_along_axis(options, best[:, :, None], 3)[..., 0]
    return used


def units_of(holds: Holds) -> tuple[Ints, Ints]:
    """(expert, device) of every unit, from [experts, devices]."""
    experts, device_of = np.nonzero(holds)
    return experts, device_of
