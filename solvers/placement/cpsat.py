"""Small placements as CP-SAT models: data, variables, constraints, objective, solve, read back."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from moecc.errors import MoeccError
from moecc.solvers.placement.balance import Ints, LayerLoads
from moecc.solvers.placement.home import patterns
from moecc.solvers.placement.layers import LayerState, Work
from moecc.solvers.placement.traffic import token_weights

WORK = 8.0
"""CP-SAT's deterministic seconds for all models of a problem together.

They end a proof that is out of reach at the same point on every machine."""
LARGEST_EXACT = 2**40


@dataclass(frozen=True, kw_only=True)
class Proof:
    """layers: (expert, device) of every unit, None if no solution was found; bound: of the objective, summed over the
    transitions of `migrate`, else over layers; cut: the wall clock ended it."""

    layers: list[tuple[Ints, Ints]] | None
    bound: float | None
    infeasible: bool
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Real numbers as integers: number = integer / scale within `error`."""

    integers: list[int]
    scale: int
    error: float


@dataclass(kw_only=True)
class _Build:
    """holds[layer][expert][device]: 1 if the device holds the expert. traffic, peaks: (variable, its largest value,
    real coefficient). slack: how far rounding to integers can shift the objective."""

    model: Any
    work: Work
    holds: list[list[list[Any]]] = field(default_factory=list)
    traffic: list[tuple[Any, int, float]] = field(default_factory=list)
    peaks: list[tuple[Any, int, float]] = field(default_factory=list)
    received: list[Any] = field(default_factory=list)
    slack: float = 0.0

    @property
    def spare(self) -> bool:
        return self.work.problem.slots > self.work.problem.num_experts


def solve_layers(work: Work, group: Sequence[int], effort: float, until: float) -> Proof:
    """The best placement of some layers under the problem's objective and cap, and a bound.

    effort: CP-SAT's deterministic seconds; until: the moment of the wall clock to stop at. The cap is on the mean
    over the layers given. Replicas: `home` traffic counts a smallest cover here, never more
    than the greedy one that the problem defines, so the bound holds for that too.
    """
    from ortools.sat.python import cp_model

    problem = work.problem
    build = _Build(model=cp_model.CpModel(), work=work)
    for index in group:
        _hold_experts(build, index)
    if problem.objective == "load" or problem.max_imbalance is not None:
        for index, holds in zip(group, build.holds, strict=True):
            _bound_loads(build, work.layers[index], holds)
    if problem.objective == "traffic":
        if problem.max_imbalance is not None:
            _cap(build, problem.max_imbalance * len(group))
        if problem.execution == "home":
            for index, holds in zip(group, build.holds, strict=True):
                _count_devices(build, index, holds)
        else:
            _count_hops(build)
    if problem.max_moves is not None:
        build.model.add(sum(build.received) <= problem.max_moves)
    terms = build.peaks if problem.objective == "load" else build.traffic
    scaled = scale_to_integers([coefficient for _, _, coefficient in terms])
    build.slack += scaled.error * sum(largest for _, largest, _ in terms)
    build.model.minimize(
        sum(c * variable for c, (variable, _, _) in zip(scaled.integers, terms, strict=True))
    )
    return _run(build, scaled.scale, effort, until)


def scale_to_integers(numbers: Sequence[float]) -> Scaled:
    """Exact where the numbers are fractions of a small common denominator, as token counts are; else rounded."""
    fractions = [Fraction(number).limit_denominator(10**6) for number in numbers]
    scale = math.lcm(*(f.denominator for f in fractions)) if fractions else 1
    exact = all(
        abs(float(f) - n) <= 4e-16 * max(1.0, abs(n)) for f, n in zip(fractions, numbers, strict=True)
    )
    if exact and scale * max((abs(f) for f in fractions), default=0) <= LARGEST_EXACT:
        integers = [int(f * scale) for f in fractions]
        return Scaled(integers=integers, scale=scale, error=0.0)
    scale = 2**32
    return Scaled(integers=[round(n * scale) for n in numbers], scale=scale, error=0.5 / scale)


def _hold_experts(build: _Build, index: int) -> None:
    problem, model = build.work.problem, build.model
    layer = build.work.layers[index]
    holds = [
        [model.new_bool_var(f"holds_{index}_{e}_{d}") for d in range(problem.devices)]
        for e in range(problem.num_experts)
    ]
    for row in holds:
        model.add_at_least_one(row) if build.spare else model.add_exactly_one(row)
    for device in range(problem.devices):
        model.add(sum(row[device] for row in holds) == problem.slots_per_device)
    label = np.arange(problem.devices)
    kept = build.work.kept
    if kept is not None:
        build.received += [holds[e][d] for e, d in np.argwhere(~kept[index]).tolist()]
    elif problem.execution == "home" or problem.objective == "load":
        # Devices are interchangeable: number them by their lowest expert. Landings break ties by number, so not there.
        order = list(dict.fromkeys(layer.device_of[np.argsort(layer.experts, kind="stable")].tolist()))
        label[order] = np.arange(problem.devices)
        if build.spare:
            model.add(holds[0][0] == 1)
        else:
            for expert in range(min(problem.num_experts, problem.devices)):
                for device in range(expert + 1, problem.devices):
                    model.add(holds[expert][device] == 0)
    hinted = set(zip(layer.experts.tolist(), label[layer.device_of].tolist(), strict=True))
    for expert, row in enumerate(holds):
        for device, variable in enumerate(row):
            model.add_hint(variable, int((expert, device) in hinted))
    build.holds.append(holds)


def _bound_loads(build: _Build, layer: LayerState, holds: list[list[Any]]) -> None:
    """A peak variable per row of the load table, at least every device's load, and the rule that combines them."""
    problem, model, table = build.work.problem, build.model, layer.table
    most = min(problem.devices, problem.slots - problem.num_experts + 1)
    multiple = math.lcm(*range(1, most + 1))
    parts = _replica_parts(build, holds, most)
    scaled = scale_to_integers(table.loads.ravel().tolist())
    rows = np.array(scaled.integers, object).reshape(table.loads.shape).tolist()
    total, unit = max(sum(row) for row in rows) * multiple, 1 / (scaled.scale * multiple)
    peaks = [model.new_int_var(0, total, "peak") for _ in rows]
    for peak, loads in zip(peaks, rows, strict=True):
        for device in range(problem.devices):
            model.add(
                peak
                >= sum(
                    load * (multiple // (r + 1)) * parts[e][r][device]
                    for e, load in enumerate(loads)
                    for r in range(most)
                )
            )
    build.peaks += [
        (variable, total, weight * unit) for variable, weight in _combined(build, table, peaks, total)
    ]
    build.slack += scaled.error * problem.num_experts


def _combined(build: _Build, table: LayerLoads, peaks: list[Any], total: int) -> list[tuple[Any, float]]:
    """Variables and weights whose sum is the rows' imbalance: their mean, their maximum, or the mean of the tail
    (CVaR as Rockafellar and Uryasev's minimum: a threshold plus what rows exceed it by, over the tail)."""
    model, shares = build.model, table.shares.tolist()
    if table.rule == "mean" or len(peaks) == 1:
        return list(zip(peaks, shares, strict=True))
    if table.rule == "worst":
        worst = model.new_int_var(0, total, "worst")
        model.add_max_equality(worst, peaks)
        return [(worst, 1.0)]
    threshold = model.new_int_var(0, total, "threshold")
    above = [model.new_int_var(0, total, "above") for _ in peaks]
    for over, peak in zip(above, peaks, strict=True):
        model.add(over >= peak - threshold)
    return [
        (threshold, 1.0),
        *((over, share / table.tail) for over, share in zip(above, shares, strict=True)),
    ]


def _replica_parts(build: _Build, holds: list[list[Any]], most: int) -> list[list[list[Any]]]:
    """parts[expert][r][device]: 1 if the device holds the expert and the expert has r + 1 replicas."""
    if most == 1:
        return [[row] for row in holds]
    model, parts = build.model, []
    for row in holds:
        count = [model.new_bool_var("count") for _ in range(most)]
        model.add_exactly_one(count)
        model.add(sum(row) == sum((r + 1) * variable for r, variable in enumerate(count)))
        part = [[model.new_bool_var("part") for _ in row] for _ in count]
        for variable, cells in zip(count, part, strict=True):
            for held, cell in zip(row, cells, strict=True):
                model.add(cell >= held + variable - 1)
        parts.append(part)
    return parts


def _cap(build: _Build, cap: float) -> None:
    scaled = scale_to_integers([coefficient for _, _, coefficient in build.peaks])
    weighted = sum(c * peak for c, (peak, _, _) in zip(scaled.integers, build.peaks, strict=True))
    build.model.add(weighted <= math.floor(cap * scaled.scale * (1 + 1e-12)))


def _count_devices(build: _Build, index: int, holds: list[list[Any]]) -> None:
    problem, model = build.work.problem, build.model
    ids, weights = patterns(build.work, index)
    fewest = -(-problem.top_k // problem.slots_per_device)
    for experts, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        reached = [model.new_bool_var("reached") for _ in range(problem.devices)]
        model.add(sum(reached) >= fewest)
        for expert in experts:
            if not build.spare:
                for use, held in zip(reached, holds[expert], strict=True):
                    model.add_implication(held, use)
                continue
            served = [model.new_bool_var("served") for _ in range(problem.devices)]
            model.add_at_least_one(served)
            for serve, use, held in zip(served, reached, holds[expert], strict=True):
                model.add_implication(serve, use)
                model.add_implication(serve, held)
        build.traffic += [(use, 1, weight) for use in reached]


def _count_hops(build: _Build) -> None:
    """Landings of all distinct top-k sets of all layers, and a hop variable per pair that tokens follow."""
    problem, model = build.work.problem, build.model
    weights = token_weights(problem)
    ids = np.sort(np.concatenate([routing.topk_ids for routing in problem.workloads]), axis=2)
    before: tuple[Ints, list[list[Any]]] | None = None
    for layer, holds in enumerate(build.holds):
        sets, index = np.unique(ids[:, layer], axis=0, return_inverse=True)
        index = index.ravel()
        lands = [_land(build, experts, holds) for experts in sets.tolist()]
        if before is not None:
            follow, which = np.unique(np.stack([before[0], index]), axis=1, return_inverse=True)
            summed = np.bincount(which.ravel(), weights)
            for (p, q), weight in zip(follow.T.tolist(), summed.tolist(), strict=True):
                hop = model.new_bool_var("hop")
                for come, go in zip(before[1][p], lands[q], strict=True):
                    model.add(hop >= come - go)
                build.traffic.append((hop, 1, weight))
        before = (index, lands)


def _land(build: _Build, experts: list[int], holds: list[list[Any]]) -> list[Any]:
    """land[device]: 1 for the device with most of the experts, ties to the lowest."""
    model, devices = build.model, build.work.problem.devices
    land = [model.new_bool_var("land") for _ in range(devices)]
    model.add_exactly_one(land)
    count = [sum(holds[e][d] for e in experts) for d in range(devices)]
    for d in range(devices):
        for other in range(devices):
            if other != d:
                model.add(count[d] - count[other] >= int(other < d)).only_enforce_if(land[d])
    return land


@contextmanager
def _interrupt_handler_kept() -> Iterator[None]:
    """CP-SAT takes Ctrl-C while it works, to return early, and leaves it to the system's default afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _run(build: _Build, scale: int, effort: float, until: float) -> Proof:
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = build.work.problem.seed % 2**31
    solver.parameters.max_deterministic_time = effort
    limit_s = max(0.05, until - time.monotonic())
    solver.parameters.max_time_in_seconds = limit_s
    with _interrupt_handler_kept():
        status = solver.solve(build.model)
    if status == cp_model.MODEL_INVALID:
        raise MoeccError(
            f"CP-SAT rejected the model: {build.model.validate()}",
            where="placement",
            hint="this is a bug of moecc: please report it with the problem's seed and trace",
        )
    if status == cp_model.INFEASIBLE:
        return Proof(layers=None, bound=None, infeasible=True, cut=False)
    ended = status == cp_model.OPTIMAL or solver.response_proto.deterministic_time >= 0.9 * effort
    cut = not ended and solver.wall_time >= 0.9 * limit_s
    if not ended and not cut:
        # CP-SAT takes Ctrl-C for itself and returns early.
        raise KeyboardInterrupt
    known = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Proof(
        layers=[_read(solver, holds) for holds in build.holds] if known else None,
        bound=solver.best_objective_bound / scale - build.slack,
        infeasible=False,
        cut=cut,
    )


def _read(solver: Any, holds: list[list[Any]]) -> tuple[Ints, Ints]:
    held = np.array([[solver.value(variable) for variable in row] for row in holds])
    experts, device_of = np.nonzero(held)
    return experts, device_of
