"""What balance costs in traffic: one short solve for every cap on imbalance, on a few of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import COSTS, figures, halves
from moecc.solvers.placement.solve import solve

CAPS = (1.03, 1.07, 1.12, 1.2, 1.35, None)
LAYERS = 6


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One placement, judged on held-out sequences. cost: fan-out (`home`) or hops (`migrate`); cap None: no cap."""

    label: str
    cap: float | None
    imbalance: float
    cost: float


def swept_layers(problem: PlacementProblem) -> list[int]:
    """The layers that a sweep solves: spread evenly; under `migrate`, where neighbours matter, a run in the middle."""
    count = min(LAYERS, problem.layers)
    if problem.execution == "migrate":
        first = (problem.layers - count) // 2
        return list(range(first, first + count))
    return [(2 * i + 1) * problem.layers // (2 * count) for i in range(count)]


def sweep(
    problem: PlacementProblem,
    *,
    start: Placement | None = None,
    time_limit_s: float,
    caps: Sequence[float | None] = CAPS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SweepPoint]:
    """Solve `traffic` under every cap, all in time_limit_s; an interrupt ends the sweep with the points it has.

    problem.workloads are whole traces, halved as everywhere; only swept_layers of them are solved and judged.
    start: a placement of all layers to search from.
    """
    layers = swept_layers(problem)
    few, begin = _only(problem, layers), None
    if start is not None:
        begin = replace(start, physical_to_logical=start.physical_to_logical[layers])
    training, _ = halves(few)
    points = []
    for cap in caps:
        task = replace(
            few,
            workloads=training,
            objective="traffic",
            max_imbalance=cap,
            time_limit_s=time_limit_s / len(caps),
        )
        label = "no cap" if cap is None else f"cap {cap:g}"
        report_progress = None if progress is None else partial(progress, "sweep of caps")
        solution = solve(task, report_progress, start=begin)
        points.append(_judged(label, solution.placement, few, cap))
        if solution.certificate.interrupted:
            break
    return points


def sweep_point(label: str, placement: Placement, problem: PlacementProblem) -> SweepPoint:
    """A placement of all layers, judged on the layers of the sweep."""
    layers = swept_layers(problem)
    rows = placement.physical_to_logical[layers]
    return _judged(label, replace(placement, physical_to_logical=rows), _only(problem, layers), None)


def _only(problem: PlacementProblem, layers: Sequence[int]) -> PlacementProblem:
    """Without the placement in force, which is one of all layers."""
    few = tuple(replace(r, topk_ids=r.topk_ids[:, list(layers)]) for r in problem.workloads)
    return replace(problem, workloads=few, in_force=None, max_moved_bytes=None)


def _judged(label: str, placement: Placement, problem: PlacementProblem, cap: float | None) -> SweepPoint:
    found = figures(placement, replace(problem, workloads=halves(problem)[1]))
    return SweepPoint(
        label=label, cap=cap, imbalance=found["balance_imbalance"], cost=found[COSTS[problem.execution]]
    )
