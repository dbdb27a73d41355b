"""Place experts and say what it is worth: what `moecc place` and the pass `place` both do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.check import evaluate
from moecc.solvers.placement.homes import PREFIX, Unit, aligned
from moecc.solvers.placement.margin import MOMENT_S, solve_unseen
from moecc.solvers.placement.placement import Placement, Solution
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import (
    Figures,
    Judged,
    PlacingReport,
    figures,
    halves,
    judge,
    judge_one,
    traffic_figure,
    worse,
)
from moecc.solvers.placement.solve import solve
from moecc.solvers.placement.start import identity

StageProgress = Callable[[str, int, int], None]
UNSEEN_SHARE = 0.25
"""Of the time limit, for solving without each workload; what the main solve leaves is added to it."""
RENAMING_SHARE = 0.15
"""Of the time limit, for renaming devices where homes are chosen."""
LEAST_SHARE = 0.25
"""Of the time limit, for solving, however long judging takes."""
RESERVE = 0.2
"""Kept free beside what judging one placement took, in units of that time."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """identity: what the placement is compared with. report: its figures as plain data. interrupted: Ctrl-C cut
    something short, the search or what comes after it."""

    solution: Solution
    identity: Placement
    report: PlacingReport
    interrupted: bool = False

    def to_json(self) -> str:
        """The text of `placement.json`."""
        return self.solution.to_json(asdict(self.report))


def place(
    problem: PlacementProblem,
    *,
    leave_one_out: bool = False,
    homes: Unit | None = None,
    layer_names: Sequence[int] | None = None,
    progress: StageProgress | None = None,
) -> Placed:
    """Solve on one half of every workload's sequences and judge on the other.

    problem.workloads are whole traces; time_limit_s is for solving and judging together; max_imbalance is for sequences
    that nobody has seen (solve_unseen). leave_one_out solves once more without each workload, if there are several,
    and judges that placement on the workload it has not seen. homes: sequences or tokens are sent to the device of
    their predicted experts, for which devices are renamed where that costs nothing else. An interrupt ends the solve in
    progress with the best placement so far and skips the solves behind it; one while judging begins that anew, a
    second one ends it.
    """
    report_progress = progress or _silent
    started = time.monotonic()
    _check_homes(problem, homes)
    training, _ = halves(problem)
    on_training = replace(problem, workloads=training)
    others = len(training) if leave_one_out and len(training) > 1 else 0
    before = identity(problem)
    report_progress("judge", 0, 0)
    base = judge_one(problem, before, homes)
    spent = time.monotonic() - started
    left = max(LEAST_SHARE * problem.time_limit_s, problem.time_limit_s - spent * (2 + RESERVE))
    limit = left * (1 - (UNSEEN_SHARE if others else 0) - (RENAMING_SHARE if homes else 0))
    solution = solve_unseen(replace(on_training, time_limit_s=limit), partial(report_progress, "solve"))
    if homes:
        deadline = time.monotonic() + left * RENAMING_SHARE
        solution = _renamed(solution, on_training, deadline)
    report_progress("judge", 0, 0)
    found, cut = _again_if_interrupted(partial(judge_one, problem, solution.placement, homes))
    report = judge(problem, base, found, layer_names=layer_names)
    interrupted = cut or solution.certificate.interrupted
    if others and not interrupted:
        margin = solution.certificate.margin
        alike = replace(problem, max_imbalance=margin.cap if margin else problem.max_imbalance)
        deadline = max(
            time.monotonic() + left * UNSEEN_SHARE / 2, started + problem.time_limit_s - RESERVE * spent
        )
        unseen, interrupted = _unseen(alike, report.before["workloads"], deadline, report_progress)
        report = replace(report, unseen=unseen, warnings=report.warnings + _unseen_warnings(unseen))
    if interrupted and len(report.unseen) < others:
        report.warnings.append("interrupted: not every workload was tried unseen")
    return Placed(solution=solution, identity=before, report=report, interrupted=interrupted)


def _again_if_interrupted(work: Callable[[], Judged]) -> tuple[Judged, bool]:
    """What the work returns, and whether an interrupt came while it was done."""
    try:
        return work(), False
    except KeyboardInterrupt:
        return work(), True


def _unseen(
    problem: PlacementProblem, before: Mapping[str, Figures], deadline: float, progress: StageProgress
) -> tuple[list[Figures], bool]:
    """A row for every workload, solved without it and judged on its held-out half; and whether that was cut short.

    before: of every workload identity's figures. deadline: of time.monotonic.
    """
    training, held_out = halves(problem)
    rows: list[Figures] = []
    try:
        for index, routing in enumerate(held_out):
            rest = training[:index] + training[index + 1 :]
            limit = (deadline - time.monotonic()) / (len(held_out) - index)
            task = replace(problem, workloads=rest, time_limit_s=max(MOMENT_S, limit))
            solution = solve(task, partial(progress, f"without {routing.name}"))
            judged = evaluate(solution.placement, routing, problem.execution, problem.links)
            row = {"before": before[routing.name], "after": asdict(judged)}
            what = worse(row["before"], row["after"], traffic_figure(problem))
            seconds = solution.certificate.wall_s
            rows.append({"workload": routing.name, **row, "worse": what, "wall_s": seconds})
            if solution.certificate.interrupted:
                return rows, True
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _unseen_warnings(rows: Sequence[Figures]) -> list[str]:
    return [
        f"solved without {row['workload']!r}, worse than identity on it: {row['worse']}"
        for row in rows
        if row["worse"]
    ]


def _check_homes(problem: PlacementProblem, homes: Unit | None) -> None:
    if homes is None:
        return
    if problem.execution == "migrate":
        raise InputError(
            "homes cannot be chosen: tokens stay where they land",
            where="execution migrate",
            hint="use execution home",
        )
    for routing in halves(problem)[1]:
        longest = int(np.unique(routing.sequence_ids, return_counts=True)[1].max())
        if homes == "sequence" and longest <= PREFIX:
            raise InputError(
                f"no held-out sequence is longer than {PREFIX} tokens",
                where=f"workload {routing.name!r}",
                hint="give longer sequences, or choose homes by token",
            )


def _renamed(solution: Solution, problem: PlacementProblem, deadline: float) -> Solution:
    """Devices renamed for chosen homes, if every figure that the certificate rests on stays what it was."""
    if problem.in_force is not None or problem.links is not None or problem.objective == "step":
        return solution
    named = aligned(solution.placement, problem.workloads, deadline)
    old, new = (figures(placement, problem)["objective"] for placement in (solution.placement, named))
    return replace(solution, placement=named) if abs(old - new) <= 1e-12 * abs(old) else solution


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
