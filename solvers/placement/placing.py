"""Place experts and say what it is worth: what `moecc place` and the pass `place` both do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from moecc.solvers.placement.margin import solve_unseen
from moecc.solvers.placement.placement import Placement, Solution
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import Figures, PlacingReport, figures, halves, judge, worse
from moecc.solvers.placement.start import identity

StageProgress = Callable[[str, int, int], None]
UNSEEN_SHARE = 0.25
"""Of the time limit, kept for judging and for solving without each workload; at least half of it is for the latter."""


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
    layer_names: Sequence[int] | None = None,
    progress: StageProgress | None = None,
) -> Placed:
    """Solve on one half of every workload's sequences and judge on the other.

    problem.workloads are whole traces; time_limit_s is for all solving together; max_imbalance is for sequences that
    nobody has seen (solve_unseen). leave_one_out solves once more without each workload, if there are several, and
    judges that placement on the workload it has not seen. An interrupt ends the solve in progress with the best
    placement so far and skips the solves behind it; one while judging begins that anew, a second one ends it.
    """
    report_progress = progress or _silent
    started = time.monotonic()
    training, _ = halves(problem)
    others = len(training) if leave_one_out and len(training) > 1 else 0
    limit = problem.time_limit_s * (1 - UNSEEN_SHARE if others else 1)
    solution = solve_unseen(
        replace(problem, workloads=training, time_limit_s=limit),
        partial(report_progress, "solve"),
    )
    interrupted = solution.certificate.interrupted
    before = identity(problem)
    report_progress("judge", 0, 0)
    try:
        report = judge(problem, before, solution.placement, layer_names=layer_names)
    except KeyboardInterrupt:
        interrupted = True
        report = judge(problem, before, solution.placement, layer_names=layer_names)
    if others and not interrupted:
        least = problem.time_limit_s * UNSEEN_SHARE / 2
        left = max(least, problem.time_limit_s - (time.monotonic() - started))
        unseen, interrupted = _unseen(problem, before, left / others, report_progress)
        found = [
            f"solved without {row['workload']!r}, worse than identity on it: {row['worse']}"
            for row in unseen
            if row["worse"]
        ]
        report = replace(report, unseen=unseen, warnings=report.warnings + found)
    if interrupted and len(report.unseen) < others:
        report.warnings.append("interrupted: not every workload was tried unseen")
    return Placed(solution=solution, identity=before, report=report, interrupted=interrupted)


def _unseen(
    problem: PlacementProblem, before: Placement, limit: float, progress: StageProgress
) -> tuple[list[Figures], bool]:
    """A row for every workload, solved without it and judged on its held-out half; and whether that was cut short."""
    training, held_out = halves(problem)
    rows: list[Figures] = []
    try:
        for index, routing in enumerate(held_out):
            rest = training[:index] + training[index + 1 :]
            solution = solve_unseen(
                replace(problem, workloads=rest, time_limit_s=limit),
                partial(progress, f"without {routing.name}"),
            )
            alone = replace(problem, workloads=(routing,))
            row = {
                side: figures(placement, alone)["workloads"][routing.name]
                for side, placement in (("before", before), ("after", solution.placement))
            }
            what = worse(row["before"], row["after"], problem.execution)
            rows.append(
                {"workload": routing.name, **row, "worse": what, "wall_s": solution.certificate.wall_s}
            )
            if solution.certificate.interrupted:
                return rows, True
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
