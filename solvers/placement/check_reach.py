"""Which devices a token's experts are fetched from, pair by pair: plain NumPy that shares no code with the solvers.

Nothing here is as large as tokens x devices, so hundreds of devices cost no more than a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.placement import Placement

Ints = NDArray[np.int64]
PAIRS = 1 << 19
"""Candidate pairs of token and device at a time: about 50 MiB of arrays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """token, device: [pairs], every device that a token reaches once, by rising token, then device.

    landing: [tokens], the device with most of a token's experts, any replica counts, ties to the lowest.
    """

    token: Ints
    device: Ints
    landing: Ints

    @property
    def tokens(self) -> int:
        return len(self.landing)

    def visits(self, devices: int) -> Ints:
        """[devices]: tokens that reach each."""
        return np.bincount(self.device, minlength=devices)

    def grouped(self, size: int) -> Reach:
        """The same with nodes of `size` consecutive devices in the place of devices."""
        node = self.device // size
        first = starts(self.token, node)
        return Reach(token=self.token[first], device=node[first], landing=self.landing // size)


def reach_of(placement: Placement, layer: int, ids: NDArray[np.int16]) -> Reach:
    """What the tokens of ids [tokens, top_k] reach in a layer.

    With replicas that is a greedy cover: the device with the most experts still to be reached, ties to the lowest.
    """
    held = _Held.of(placement, layer)
    step = max(1, PAIRS // (ids.shape[1] * int(held.replicas.max())))
    parts = [_reach(held, ids[at : at + step].astype(np.int64)) for at in range(0, len(ids), step)]
    offsets = np.repeat(np.arange(0, len(ids), step), [len(part.token) for part in parts])
    return Reach(
        token=np.concatenate([part.token for part in parts]) + offsets,
        device=np.concatenate([part.device for part in parts]),
        landing=np.concatenate([part.landing for part in parts]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    """Of one layer: expert e is on device[first[e] : first[e] + replicas[e]], in rising order."""

    device: Ints
    first: Ints
    replicas: Ints
    devices: int
    width: int

    @staticmethod
    def of(placement: Placement, layer: int) -> _Held:
        row = placement.physical_to_logical[layer]
        replicas = np.bincount(row, minlength=placement.num_experts)
        return _Held(
            device=np.argsort(row, kind="stable") // placement.slots_per_device,
            first=np.cumsum(replicas) - replicas,
            replicas=replicas,
            devices=placement.devices,
            width=placement.slots_per_device,
        )


def _reach(held: _Held, ids: Ints) -> Reach:
    if held.width == 1:
        # No device has two of a token's experts: the cover takes each on its lowest device.
        lowest = np.sort(held.device[held.first[ids]], axis=1)
        every = np.repeat(np.arange(len(ids)), ids.shape[1])
        return Reach(token=every, device=lowest.ravel(), landing=lowest[:, 0])
    token, device, choice = _candidates(held, ids)
    runs, best = _fullest(held.devices, token, device)
    if len(token) == ids.size:
        return Reach(token=token[runs], device=device[runs], landing=best)
    landing, taken = best, [np.arange(len(ids)) * held.devices + best]
    while True:
        covered = np.zeros(ids.shape, np.bool_)
        now = device == best[token]
        covered[token[now], choice[now]] = True
        open_ = np.flatnonzero(~covered[token, choice])
        if not len(open_):
            break
        token, device, choice = token[open_], device[open_], choice[open_]
        _, of_open = _fullest(held.devices, token, device)
        tokens = token[starts(token)]
        best = np.full(len(ids), -1)
        best[tokens] = of_open
        taken.append(tokens * held.devices + of_open)
    token, device = np.divmod(np.sort(np.concatenate(taken)), held.devices)
    return Reach(token=token, device=device, landing=landing)


def _candidates(held: _Held, ids: Ints) -> tuple[Ints, Ints, Ints]:
    """(token, device, which of the token's choices) of every replica of every choice, by rising token, then device."""
    tokens, k = ids.shape
    counts, entries = entries_of(held.first, held.replicas, ids)
    device = held.device[entries]
    for_choice, for_device = (k - 1).bit_length(), (held.devices - 1).bit_length()
    row = (np.arange(tokens) << (for_device + for_choice))[:, None] | np.arange(k)
    key = np.sort(np.repeat(row.ravel(), counts) | (device << for_choice))
    pair = key >> for_choice
    return pair >> for_device, pair & ((1 << for_device) - 1), key & ((1 << for_choice) - 1)


def entries_of(first: Ints, counts: Ints, ids: Ints) -> tuple[Ints, Ints]:
    """For every id of ids (any shape) counts[id], and first[id], first[id] + 1, ...: counts[id] entries."""
    each = counts[ids].ravel()
    ends = np.cumsum(each)
    return each, np.arange(ends[-1]) + np.repeat(first[ids].ravel() - (ends - each), each)


def _fullest(devices: int, token: Ints, device: Ints) -> tuple[Ints, Ints]:
    """Where each pair's run starts, and of every token that occurs the device with most entries, the lowest of them."""
    runs = starts(token, device)
    count = np.diff(np.append(runs, len(token)))
    score = count * devices + (devices - 1 - device[runs])
    return runs, devices - 1 - np.maximum.reduceat(score, starts(token[runs])) % devices


def starts(*columns: Ints) -> Ints:
    """The first index of every run of rows that agree in all columns, of one row or more."""
    differs = np.zeros(len(columns[0]), np.bool_)
    differs[0] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(differs)
