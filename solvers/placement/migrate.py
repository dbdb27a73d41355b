"""Traffic under `migrate`: a layer is searched between the landings of its neighbours, in sweeps over the layers."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.search import TOLERANCE, reduce_traffic
from moecc.solvers.placement.start import gathered_start
from moecc.solvers.placement.traffic import MigrateRows, TrafficRows, home_rows, token_weights

SWEEPS = 4


class Tokens:
    """The tokens of all workloads, and where they land in every layer as placed so far."""

    def __init__(self, work: Work) -> None:
        self.ids = np.concatenate([routing.topk_ids for routing in work.problem.workloads])
        self.weight = token_weights(work.problem)
        self.land = np.stack(
            [self.rows(work, index, []).landing(_padded(work, index)) for index in range(len(work.layers))]
        )

    def rows(self, work: Work, index: int, neighbours: list[int], experts: Ints | None = None) -> MigrateRows:
        """The layer's tokens between the landings of neighbours, with the units of `experts` or its own."""
        at = self.land[neighbours].T if neighbours else np.empty((len(self.ids), 0), np.int64)
        ids = self.ids[:, index].astype(np.int64)
        experts = work.layers[index].experts if experts is None else experts
        return MigrateRows(ids, self.weight, experts, work.problem.devices, at)

    def land_anew(self, work: Work, index: int) -> None:
        """After the layer's experts moved."""
        self.land[index] = self.rows(work, index, []).landing(_padded(work, index))

    def hops(self) -> float:
        """Landing changes per token, summed over transitions."""
        return float(((self.land[1:] != self.land[:-1]) @ self.weight).sum())


def search_migrate(work: Work) -> None:
    """First layer by layer forwards, then sweeps back and forth until one gains nothing."""
    tokens, count = Tokens(work), len(work.layers)
    total = (SWEEPS + 1) * count
    if count == 1:
        return
    _forward(work, tokens, total)
    before = tokens.hops()
    for sweep in range(SWEEPS):
        order = range(count) if sweep % 2 else range(count - 1, -1, -1)
        for step, index in enumerate(order):
            neighbours = [n for n in (index - 1, index + 1) if 0 <= n < count]
            rows = tokens.rows(work, index, neighbours)
            parts_left = (SWEEPS - sweep) * count - step
            _improve(work, tokens, rows, index, work.layers[index].device_of, parts_left, sweep)
            work.tick((sweep + 1) * count + step + 1, total)
        after = tokens.hops()
        if after > before - TOLERANCE:
            break
        before = after
    work.tick(total, total)


def _forward(work: Work, tokens: Tokens, total: int) -> None:
    """Layer 0 gathers experts that are chosen together; every later layer follows the landings of the one before."""
    saved, hops, better = [layer.device_of for layer in work.layers], tokens.hops(), False
    try:
        for index, layer in enumerate(work.layers):
            if index == 0:
                home = home_rows(work.problem, 0, layer.experts)
                begin = gathered_start(home.ids, home.weight, layer.experts, work.problem.devices)
                _improve(work, tokens, home, 0, begin, total, SWEEPS)
            else:
                begin = _follow(layer, tokens.ids[:, index], tokens.weight, tokens.land[index - 1])
                rows = tokens.rows(work, index, [index - 1])
                _improve(work, tokens, rows, index, begin, total - index, SWEEPS)
            work.tick(index + 1, total)
        better = tokens.hops() <= hops
    finally:
        if not better:
            for index, (layer, device_of) in enumerate(zip(work.layers, saved, strict=True)):
                layer.device_of = device_of
                tokens.land_anew(work, index)


def _improve(
    work: Work, tokens: Tokens, rows: TrafficRows, index: int, begin: Ints, parts_left: int, sweep: int
) -> None:
    """Search one layer from `begin` and let its tokens land anew; nothing changes if the cap was never met."""
    found = reduce_traffic(
        rows,
        work.layers[index].table,
        begin,
        cap=float(work.caps[index]),
        budget=4 * work.problem.slots,
        rng=work.rng(index, 2 + sweep),
        clock=work.clock,
        until=work.clock.slice(parts_left),
    )
    if found is not None:
        work.layers[index].device_of = found.device_of
        tokens.land_anew(work, index)


def _follow(layer: LayerState, ids: Ints, weight: Floats, land: Ints) -> Ints:
    """Each expert to the device where most of its tokens come from, the strongest ties first, while slots last."""
    units, devices = len(layer.experts), layer.table.devices
    if layer.experts[-1] + 1 != units:
        return layer.device_of
    flat = ids.astype(np.int64) * devices + land[:, None]
    pull = np.bincount(flat.ravel(), np.repeat(weight, ids.shape[1]), minlength=units * devices)
    device_of, free = np.full(units, -1), np.bincount(layer.device_of, minlength=devices)
    for pair in np.argsort(-pull, kind="stable"):
        unit, device = divmod(int(pair), devices)
        if device_of[unit] < 0 and free[device]:
            device_of[unit] = device
            free[device] -= 1
    return device_of


def summed_hops(work: Work) -> float:
    """Landing changes per token as placed, summed over transitions."""
    return Tokens(work).hops()


def _padded(work: Work, index: int) -> Ints:
    return np.append(work.layers[index].device_of, work.problem.devices)
