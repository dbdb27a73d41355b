"""Token homes chosen by what their experts are expected to be: sequences sent where most of their experts live."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.carry import names_by_node
from moecc.solvers.placement.check import evaluate
from moecc.solvers.placement.check_traffic import hosts
from moecc.solvers.placement.placement import Placement
from moecc.solvers.routing import Routing

Unit = Literal["sequence", "token"]
TURNS = 4
PREFIX = 32
"""Tokens of a sequence that are seen before it is sent: prefill routes them anyway."""


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """routing: the scored tokens with their homes. before, after: distinct devices but the home per token and layer,
    homes random (the exact mean) and chosen. most: tokens of the fullest device / mean."""

    routing: Routing
    before: float
    after: float
    most: float


def shuffle(
    placement: Placement, train: Sequence[Routing], routing: Routing, unit: Unit = "sequence"
) -> Shuffle:
    """Choose homes for a held-out workload, and score them (Speculative MoE's token shuffling, arXiv 2503.04398).

    `sequence`: sent by the experts of its first PREFIX tokens and by how experts follow one another in the training
    traces; only later tokens are scored. `token`: sent anew in every step, by its experts of the first layer alone,
    which predict the others (top_k experts are known once layer 0's router has run). Every device gets equally many
    tokens: up to one for `token`, up to the longest sequence for `sequence`.
    """
    if unit == "sequence":
        seen = _position(routing.sequence_ids) < PREFIX
        scored = routing.take(~seen)
        if not len(scored.topk_ids):
            raise InputError(
                f"no sequence is longer than {PREFIX} tokens",
                where=f"workload {routing.name!r}",
                hint="give longer sequences, or choose homes by token",
            )
        names, group = np.unique(scored.sequence_ids, return_inverse=True)
        wanted = np.zeros((len(names), placement.devices))
        prefix = routing.take(seen & np.isin(routing.sequence_ids, names))
        rows = np.searchsorted(names, prefix.sequence_ids)
        np.add.at(wanted, rows, _pull(placement, prefix.topk_ids))
        wanted /= np.bincount(rows, minlength=len(names))[:, None]
    else:
        scored, group = routing, np.arange(len(routing.topk_ids))
        wanted = _predicted(placement, train)[routing.topk_ids[:, 0]].sum(axis=1)
    sizes = np.bincount(group)
    homes = assign(wanted * sizes[:, None], sizes)[group]
    given = replace(scored, homes=homes.astype(np.int32))
    return Shuffle(
        routing=given,
        before=evaluate(placement, replace(scored, homes=None), "home").remote_fan_out,
        after=evaluate(placement, given, "home").remote_fan_out,
        most=float(np.bincount(homes, minlength=placement.devices).max() * placement.devices / len(homes)),
    )


def aligned(placement: Placement, train: Sequence[Routing], deadline: float = math.inf) -> Placement:
    """The same placement with every layer's devices renamed so that tokens meet their experts on one device again.

    Under `home` names change no fan-out and no balance; nodes stay together. They decide what a chosen home is worth:
    layers take names in turn, each by the devices that its tokens reach under the names of all others, until the
    deadline, of time.monotonic.
    """
    size, per_node = placement.devices, placement.devices_per_node
    layers = range(placement.layers)
    ids = np.concatenate([routing.topk_ids for routing in train])
    weight = np.concatenate([np.full(len(r.topk_ids), r.weight / len(r.topk_ids), np.float32) for r in train])
    reach = np.stack([hosts(placement, i)[ids[:, i]].any(axis=1) for i in layers])
    name = np.tile(np.arange(size), (placement.layers, 1))
    total = np.zeros(reach.shape[1:], np.float32)
    for turn in range(TURNS):
        for i in layers:
            if time.monotonic() >= deadline:
                break
            if turn:
                total[:, name[i]] -= reach[i]
            gains = np.where(reach[i], weight[:, None], 0).T @ total
            scaled = np.rint(gains / max(float(gains.max()), 1e-30) * 2**24).astype(np.int64)
            name[i] = names_by_node(scaled, per_node)
            total[:, name[i]] += reach[i]
    rows = placement.physical_to_logical.reshape(placement.layers, size, -1)
    renamed = np.empty_like(rows)
    renamed[np.arange(placement.layers)[:, None], name] = rows
    return replace(placement, physical_to_logical=renamed.reshape(placement.layers, -1))


def assign(gains: Floats, sizes: Ints) -> Ints:
    """[groups]: a device for each group of tokens, by falling regret, the gainful first, while devices have room.

    gains: [groups, devices]; sizes: [groups] tokens. A device is full once it holds its even share of all tokens.
    """
    devices = gains.shape[1]
    room = np.full(devices, -(-int(sizes.sum()) // devices))
    best = np.sort(gains, axis=1)
    regret = (best[:, -1] - best.mean(axis=1)) / sizes
    home = np.zeros(len(gains), np.int64)
    for group in np.lexsort((-sizes, -regret)):
        fits = room >= sizes[group]
        # Where a sequence fits nowhere the emptiest device takes it.
        open_ = fits if fits.any() else room == room.max()
        home[group] = np.where(open_, gains[group], -np.inf).argmax()
        room[home[group]] -= sizes[group]
    return home


def _pull(placement: Placement, ids: NDArray[np.int16]) -> Floats:
    """[tokens, devices]: layers in which the device computes for the token."""
    return np.asarray(
        sum(
            hosts(placement, layer)[ids[:, layer]].any(axis=1).astype(np.float64)
            for layer in range(ids.shape[1])
        )
    )


def _predicted(placement: Placement, train: Sequence[Routing]) -> Floats:
    """[experts of layer 0, devices]: layers in which a training token of the expert needs the device, on average."""
    summed = np.zeros((placement.num_experts, placement.devices))
    counts = np.zeros(placement.num_experts)
    for routing in train:
        first = routing.topk_ids[:, 0].astype(np.int64)
        share = routing.weight / len(first)
        needed = np.repeat(_pull(placement, routing.topk_ids), first.shape[1], axis=0)
        np.add.at(summed, first.ravel(), share * needed)
        counts += share * np.bincount(first.ravel(), minlength=placement.num_experts)
    mean = summed.sum(axis=0) / counts.sum()
    return np.where(counts[:, None] > 0, summed / np.maximum(counts, 1e-300)[:, None], mean)


def _position(sequence_ids: NDArray[np.int32]) -> Ints:
    """[tokens]: how many tokens of its sequence stand before each."""
    order = np.argsort(sequence_ids, kind="stable")
    ordered = sequence_ids[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return position
