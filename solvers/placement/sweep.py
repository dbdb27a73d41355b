"""What balance costs in traffic: one short solve for every cap on imbalance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import COSTS, figures, halves
from moecc.solvers.placement.solve import solve

CAPS = (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, None)


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One placement, judged on held-out sequences. cost: fan-out (`home`) or hops (`migrate`); cap None: no cap."""

    label: str
    cap: float | None
    imbalance: float
    cost: float


def sweep(
    problem: PlacementProblem,
    *,
    time_limit_s: float,
    caps: Sequence[float | None] = CAPS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SweepPoint]:
    """Solve `traffic` under every cap, all in time_limit_s; an interrupt ends the sweep with the points it has.

    problem.workloads are whole traces, halved as everywhere.
    """
    training, _ = halves(problem)
    points = []
    for cap in caps:
        task = replace(
            problem,
            workloads=training,
            objective="traffic",
            max_imbalance=cap,
            time_limit_s=time_limit_s / len(caps),
        )
        label = "no cap" if cap is None else f"cap {cap:g}"
        solution = solve(task, None if progress is None else partial(progress, f"sweep: {label}"))
        points.append(sweep_point(label, solution.placement, problem, cap=cap))
        if solution.certificate.interrupted:
            break
    return points


def sweep_point(
    label: str, placement: Placement, problem: PlacementProblem, *, cap: float | None = None
) -> SweepPoint:
    """Any placement among the points of a sweep."""
    found = figures(placement, replace(problem, workloads=halves(problem)[1]))
    return SweepPoint(
        label=label, cap=cap, imbalance=found["balance_imbalance"], cost=found[COSTS[problem.execution]]
    )
