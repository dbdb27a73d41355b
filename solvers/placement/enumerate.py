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
    if spare:
        sets = itertools.combinations(range(experts), width)
        filled = np.array(list(itertools.product(sets, repeat=devices)), np.int64)
    else:
        filled = np.array(_partitions(tuple(range(experts)), devices, width), np.int64)
    holds = np.zeros((len(filled), experts, devices), np.bool_)
    device = np.arange(devices)[None, :, None]
    holds[np.arange(len(filled))[:, None, None], filled, device] = True
    complete = np.asarray(holds.any(axis=2))
    return np.asarray(holds[complete.all(axis=1)])


def _partitions(free: tuple[int, ...], devices: int, width: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every way to deal all `free` experts to the devices."""
    if devices == 0:
        return [()]
    return [
        (held, *rest)
        for held in itertools.combinations(free, width)
        for rest in _partitions(tuple(e for e in free if e not in held), devices - 1, width)
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
