"""Experts of adjacent layers that tokens choose one after the other, brought onto one device: annealing of the chain.

Traffic between two layers is, pair of experts by pair, a table; given its neighbours a layer is then a linear problem,
and swaps in every second layer, between disjoint pairs of devices, do not touch each other. All of them are drawn at
once from their Boltzmann distribution (heat bath), which replaces the accepted-or-rejected single swaps of simulated
annealing (Kirkpatrick et al., 1983).
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.traffic import token_weights

Singles = NDArray[np.float32]
Mask = NDArray[np.bool_]

STEPS = 40
"""Steps per unit of a layer."""
INNER = 4
"""Draws for one half of the layers before the other half takes its turn."""
HOT, COLD = 4.5, 0.09
"""First and last temperature, in standard deviations of what a swap gains at the start."""
EXCESS = 0.5
"""Price of one mean device load above a layer's cap; all pairs of a transition together are worth 1."""
MOST_ROWS = 8
"""Rows of the load table that are priced one by one; of more (batches) their mean is."""
NOISE = 1 << 20


def follow_table(work: Work) -> Singles:
    """[layers - 1, experts, experts]: share of the top_k x top_k expert pairs of a transition; each sums to 1."""
    problem = work.problem
    size = problem.num_experts
    ids = np.concatenate([routing.topk_ids for routing in problem.workloads]).astype(np.int64)
    weight = np.repeat(token_weights(problem), problem.top_k**2) / problem.top_k**2
    tables = np.zeros((problem.layers - 1, size, size), np.float32)
    for layer, table in enumerate(tables):
        pairs = ids[:, layer, :, None] * size + ids[:, layer + 1, None, :]
        table[:] = np.bincount(pairs.ravel(), weight, minlength=size**2).reshape(size, size)
    return tables


def pull(work: Work, table: Singles, index: int) -> Floats:
    """[units, devices]: what each unit of a layer shares with its neighbours on each device; table: follow_table's."""
    devices, experts = work.problem.devices, work.layers[index].experts
    shared = np.zeros((work.problem.num_experts, devices))
    for other in (index - 1, index + 1):
        if 0 <= other < len(work.layers):
            near = work.layers[other]
            pairs = table[index] if other > index else table[other].T
            at = np.eye(devices)[near.device_of] / np.sqrt(_replicas(near.experts))[:, None]
            shared += pairs[:, near.experts] @ at
    return np.asarray(shared[experts] / np.sqrt(_replicas(experts))[:, None])


def _replicas(experts: Ints) -> Ints:
    """[units]: how many units the expert of each has."""
    return np.bincount(experts)[experts]


def anneal(work: Work, table: Singles, share: float) -> None:
    """Put pairs of experts that tokens choose in adjacent layers on one device, within the caps as far as they go.

    table: follow_table's. share: of the time left that may be used. Caps are priced, not kept: the searches that
    follow end within them.
    """
    chain, rng = _Chain(work, table), work.rng(0, 98)
    noise = rng.gumbel(size=NOISE).astype(np.float32)
    begun = time.monotonic()
    allowed = share * max(0.0, work.clock.deadline - begun)
    halves = [np.arange(first, len(work.layers), 2) for first in (0, 1)]
    hot = chain.spread(halves)
    steps = STEPS * work.problem.slots
    for step in range(steps):
        # On a slow machine the clock takes the temperature down sooner; then the answer depends on it.
        late = (time.monotonic() - begun) / max(allowed, 1e-9)
        work.clock.cut |= late > (step + 1) / steps
        done = max((step + 1) / steps, late)
        if late >= 1:
            break
        temperature = hot * HOT * (COLD / HOT) ** done
        for half in halves:
            worth = chain.worth(half)
            for _ in range(INNER):
                chain.draw(half, worth, temperature, noise, rng)
    for layer, at in zip(work.layers, chain.at, strict=True):
        layer.device_of = at.argmax(axis=1)


class _Chain:
    """All layers under one assignment. members: [layers, devices, slots] units.

    forward, backward: [layers, units, units], what a pair with the next or the previous layer is worth on one device;
    loads: [layers, rows, units]; sums: [layers, rows, devices]; at: [layers, units, devices], 1 where a unit is;
    held: [layers, experts, devices].
    """

    def __init__(self, work: Work, table: Singles) -> None:
        problem, layers = work.problem, work.layers
        device_of = np.stack([layer.device_of for layer in layers])
        index = np.arange(len(layers))[:, None]
        self.experts = np.stack([layer.experts for layer in layers])
        self.members = np.argsort(device_of, axis=1, kind="stable").reshape(
            len(layers), problem.devices, problem.slots_per_device
        )
        self.at = np.zeros((len(layers), problem.slots, problem.devices), np.float32)
        self.at[index, np.arange(problem.slots), device_of] = 1
        self.held = np.zeros((len(layers), problem.num_experts, problem.devices), np.bool_)
        self.held[index, self.experts, device_of] = True
        self.forward = np.zeros((len(layers), problem.slots, problem.slots), np.float32)
        single = [1 / np.sqrt(_replicas(experts)) for experts in self.experts]
        for i, pairs in enumerate(table):
            shared = pairs[self.experts[i][:, None], self.experts[i + 1]]
            self.forward[i] = shared * single[i][:, None] * single[i + 1]
        self.backward = np.zeros_like(self.forward)
        self.backward[1:] = self.forward[:-1].transpose(0, 2, 1)
        rows = [layer.table.per_unit(layer.experts) for layer in layers]
        shares = layers[0].table.shares
        if len(shares) > MOST_ROWS:
            rows, shares = [shares @ row[None] for row in rows], np.ones(1)
        self.loads, self.shares = np.stack(rows).astype(np.float32), shares.astype(np.float32)
        self.sums = self.loads @ self.at
        self.caps = np.where(np.isfinite(work.caps), work.caps, 1e9).astype(np.float32)
        self.single = problem.slots == problem.num_experts

    def worth(self, half: Ints) -> Singles:
        """[half, units, devices]: what each unit would share with its neighbours on each device."""
        last = len(self.at) - 1
        after = self.forward[half] @ self.at[np.minimum(half + 1, last)]
        return np.asarray(after + self.backward[half] @ self.at[np.maximum(half - 1, 0)])

    def spread(self, halves: list[Ints]) -> float:
        """The standard deviation of what moving a unit to another device gains."""
        gains = [worth - worth.mean(axis=2, keepdims=True) for worth in map(self.worth, halves) if worth.size]
        return float(np.concatenate([gain.ravel() for gain in gains]).std()) or 1.0

    def draw(
        self, half: Ints, worth: Singles, temperature: float, noise: Singles, rng: np.random.Generator
    ) -> None:
        """One swap or none for each of disjoint pairs of devices in each layer of the half."""
        layers, devices, width = len(half), self.at.shape[2], self.members.shape[2]
        pairs = devices // 2
        order = np.argsort(rng.random((layers, devices)), axis=1)
        a, b = order[:, :pairs], order[:, pairs : 2 * pairs]
        deep = np.arange(layers)[:, None, None]
        layer = half[:, None]
        left, right = self.members[layer, a], self.members[layer, b]
        at_a, at_b = a[:, :, None], b[:, :, None]
        gain_left = worth[deep, left, at_b] - worth[deep, left, at_a]
        gain_right = worth[deep, right, at_a] - worth[deep, right, at_b]
        gain = gain_left[:, :, :, None] + gain_right[:, :, None, :]
        change, price = self._load_changes(half, left, right, a, b)
        score = (gain - EXCESS * price) / temperature
        if not self.single:
            in_b = self.held[half[:, None, None], self.experts[half][deep, left], at_b]
            in_a = self.held[half[:, None, None], self.experts[half][deep, right], at_a]
            score[in_b[:, :, :, None] | in_a[:, :, None, :]] = -np.inf
        options = width * width + 1
        start = int(rng.integers(0, len(noise) - layers * pairs * options))
        luck = noise[start : start + layers * pairs * options].reshape(layers, pairs, options)
        drawn = score.reshape(layers, pairs, -1) + luck[:, :, 1:]
        best = drawn.argmax(axis=2)
        taken = np.take_along_axis(drawn, best[:, :, None], 2)[:, :, 0] > luck[:, :, 0]
        rows, columns = np.nonzero(taken)
        i, j = np.divmod(best[rows, columns], width)
        self._swap(half[rows], a[rows, columns], b[rows, columns], i, j, change[rows, :, columns, i, j])

    def _load_changes(self, half: Ints, left: Ints, right: Ints, a: Ints, b: Ints) -> tuple[Singles, Singles]:
        """What a gains [layers, rows, pairs, slots, slots], and the change of the excess over the cap (no rows)."""
        loads, sums = self.loads[half], self.sums[half]
        layers, rows = loads.shape[:2]
        deep, row = np.arange(layers)[:, None, None, None], np.arange(rows)[:, None, None]
        change = loads[deep, row, right[:, None]][..., None, :] - loads[deep, row, left[:, None]][..., None]
        flat, column = np.arange(layers)[:, None, None], np.arange(rows)[:, None]
        cap = self.caps[half][:, None, None]
        over_a = sums[flat, column, a[:, None]] - cap
        over_b = sums[flat, column, b[:, None]] - cap
        after = np.maximum(over_a[..., None, None] + change, 0)
        after += np.maximum(over_b[..., None, None] - change, 0)
        before = np.maximum(over_a, 0) + np.maximum(over_b, 0)
        after -= before[..., None, None]
        if rows == 1:
            return change, after[:, 0]
        return change, np.tensordot(after, self.shares, (1, 0))

    def _swap(self, layer: Ints, a: Ints, b: Ints, i: Ints, j: Ints, change: Singles) -> None:
        u, v = self.members[layer, a, i], self.members[layer, b, j]
        self.members[layer, a, i], self.members[layer, b, j] = v, u
        self.at[layer, u, a], self.at[layer, u, b] = 0, 1
        self.at[layer, v, b], self.at[layer, v, a] = 0, 1
        for unit, come, go in ((u, b, a), (v, a, b)):
            self.held[layer, self.experts[layer, unit], go] = False
            self.held[layer, self.experts[layer, unit], come] = True
        self.sums[layer, :, a] += change
        self.sums[layer, :, b] -= change
