"""A placement under construction: every layer's best assignment so far, and the phases that improve it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import Floats, Ints, LayerLoads, layer_loads
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.fast import fast_start
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.search import TOLERANCE, Clock, balance_layer
from moecc.solvers.placement.served import loads_of


@dataclass(kw_only=True)
class LayerState:
    """One layer. experts, device_of: [units]; imbalance: of that assignment."""

    table: LayerLoads
    experts: Ints
    device_of: Ints

    @property
    def imbalance(self) -> float:
        return loads_of(self.table, self.experts, self.device_of).imbalance


@dataclass(kw_only=True)
class Work:
    """A solve in progress. caps: [layers], the imbalance each layer may have.

    bounds: proven lower bounds of the layers' objective, where one is known. proven: the whole objective's lower
    bound, where a method that couples layers found it. kept: [layers, experts, devices], what devices hold already,
    if few may move. exact_layers: how many layers CP-SAT was run on.
    numbers: the layers' own numbers, where these are some of a problem's.
    """

    problem: PlacementProblem
    clock: Clock
    layers: list[LayerState]
    caps: Floats
    tick: Callable[[int, int], None]
    bounds: list[float | None] = field(default_factory=list)
    proven: float | None = None
    proven_infeasible: bool = False
    exact_layers: int = 0
    kept: NDArray[np.bool_] | None = None
    notes: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def rng(self, layer: int, *key: int) -> np.random.Generator:
        """The generator of a layer's phase: the same whichever other layers are at hand."""
        return np.random.default_rng([self.problem.seed, self.numbers[layer], *key])

    @property
    def mean_imbalance(self) -> float:
        return float(np.mean([layer.imbalance for layer in self.layers]))


def begin(problem: PlacementProblem, clock: Clock, tick: Callable[[int, int], None]) -> Work:
    """Every layer replicated and balanced greedily: a valid placement from the first moment."""
    tables = layer_loads(problem)
    starts = fast_start(tables, problem.slots_per_device, clock.deadline)
    layers = [
        LayerState(table=table, experts=experts, device_of=device_of)
        for table, (experts, device_of) in zip(tables, starts, strict=True)
    ]
    caps = np.full(problem.layers, np.inf)
    return Work(
        problem=problem,
        clock=clock,
        layers=layers,
        caps=caps,
        tick=tick,
        bounds=[None] * problem.layers,
        numbers=list(range(problem.layers)),
    )


def start_from(work: Work, placement: Placement) -> None:
    """Every layer as in a placement of the same layers, experts, devices and slots."""
    device_of_slot = np.arange(placement.slots) // placement.slots_per_device
    for layer, row in zip(work.layers, placement.physical_to_logical, strict=True):
        order = np.lexsort((device_of_slot, row))
        layer.experts, layer.device_of = row[order].astype(np.int64), device_of_slot[order]


def balance(work: Work, *, stop_at: float) -> None:
    """Lower the imbalance of every layer to `stop_at`, or as far as it goes."""
    width, total = work.problem.slots_per_device, len(work.layers)
    for index, layer in enumerate(work.layers):
        found = balance_layer(
            layer.table,
            layer.experts,
            layer.device_of,
            floor=max(stop_at, lower_bound(layer.table, width)),
            rng=work.rng(index, 0),
            clock=work.clock,
            until=work.clock.slice(total - index),
        )
        layer.device_of = found.device_of
        work.tick(index + 1, total)


def spread_cap(work: Work, cap: float) -> bool:
    """Give every layer its own cap so that their mean is `cap`; False if the balance reached does not allow it.

    Layers that cannot go lower keep what they reached; the others share the rest evenly (water filling).
    """
    reached = np.array([layer.imbalance for layer in work.layers])
    if reached.mean() > cap + TOLERANCE:
        work.caps = reached
        return False
    level = cap
    for _ in range(len(reached)):
        stuck = reached > level
        if not stuck.any():
            break
        level = (cap * len(reached) - reached[stuck].sum()) / max(1, (~stuck).sum())
    work.caps = np.maximum(reached, level)
    return True


def remaining(clock: Clock) -> float:
    """Seconds until the deadline."""
    return clock.deadline - time.monotonic()
