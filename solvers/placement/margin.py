"""A cap on the imbalance that is *expected on unseen sequences*: hold some out, see the gap, tighten the cap by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.placement import INTERRUPTED, Margin, Solution
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.solve import solve

TRIAL_SHARE = 0.15
"""Of the time limit, for each of the two trials."""
MOMENT_S = 0.1
"""Seconds to certify what an interrupted trial found."""


def solve_unseen(problem: PlacementProblem, progress: Callable[[int, int], None] | None = None) -> Solution:
    """As `solve`, but max_imbalance bounds the mean over layers that is expected on sequences nobody has seen.

    The sequences of every workload are halved; each half is solved for under the cap and judged on the other. The
    cap is tightened by the mean gap between the imbalance there and on the half that was solved for, and the problem
    solved on all sequences. Half as many sequences are noisier than all, so the gap errs on the safe side. The
    certificate's `margin` says what was asked, seen and used. Without a cap this is `solve`. progress counts each of
    the three solves from its start.
    """
    cap = problem.max_imbalance
    if cap is None or any(len(routing.topk_ids) < 2 for routing in problem.workloads):
        return solve(problem, progress)
    started, gaps = time.monotonic(), list[float]()
    halves = [routing.split(problem.seed) for routing in problem.workloads]
    trial_s = problem.time_limit_s * TRIAL_SHARE
    for fit in (0, 1):
        trial = replace(problem, workloads=tuple(pair[fit] for pair in halves), time_limit_s=trial_s)
        tried = solve(trial, progress)
        unseen = tuple(pair[1 - fit] for pair in halves)
        gaps.append(imbalance_of(tried.placement, trial, unseen) - imbalance_of(tried.placement, trial))
        if tried.certificate.interrupted:
            break
    gap = max(0.0, sum(gaps) / len(gaps))
    interrupted = tried.certificate.interrupted
    left = problem.time_limit_s - (time.monotonic() - started)
    final = replace(
        problem,
        max_imbalance=max(1.0, cap - gap),
        time_limit_s=MOMENT_S if interrupted else max(trial_s, left),
    )
    # Replicas that half of the sequences ask for may not suit all of them.
    start = tried.placement if interrupted or problem.slots == problem.num_experts else None
    return _with_margin(problem, solve(final, progress, start=start), final, gap, interrupted, started)


def _with_margin(
    asked: PlacementProblem,
    solution: Solution,
    final: PlacementProblem,
    gap: float,
    interrupted: bool,
    started: float,
) -> Solution:
    assert asked.max_imbalance is not None
    assert final.max_imbalance is not None
    margin = Margin(
        asked=asked.max_imbalance,
        gap=gap,
        cap=final.max_imbalance,
        expected=imbalance_of(solution.placement, asked) + gap,
    )
    certificate, notes = solution.certificate, [solution.certificate.note]
    if interrupted and not certificate.interrupted:
        notes.insert(0, INTERRUPTED)
    return replace(
        solution,
        certificate=replace(
            certificate,
            status="time_limit" if interrupted and certificate.status == "feasible" else certificate.status,
            wall_s=time.monotonic() - started,
            note="; ".join(filter(None, notes)),
            margin=margin,
        ),
    )
