"""Solve a placement problem: start, balance, search, prove where small, check, certify."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from moecc.errors import MoeccError
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.carry import match_devices
from moecc.solvers.placement.check import evaluate_all, moved_experts, objective_of
from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.exact import chained, prove
from moecc.solvers.placement.home import home_cost, search_home
from moecc.solvers.placement.labels import label_devices
from moecc.solvers.placement.layers import Work, balance, begin, spread_cap, start_from
from moecc.solvers.placement.migrate import join_nodes, search_migrate, summed_hops
from moecc.solvers.placement.pairs import share_out
from moecc.solvers.placement.parallel import Team
from moecc.solvers.placement.placement import INTERRUPTED, Certificate, Placement, Solution, Status
from moecc.solvers.placement.prices import least_link_cost
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.search import TOLERANCE, Clock
from moecc.solvers.placement.start import to_placement
from moecc.solvers.placement.step import layer_us, least_us, search_step
from moecc.solvers.placement.within import search_within, start_in_force

Progress = Callable[[int, int], None]


def solve(
    problem: PlacementProblem, progress: Progress | None = None, *, start: Placement | None = None
) -> Solution:
    """The best placement found within problem.time_limit_s, checked, with a certificate.

    start: a placement of the same shape to search from. progress is called as progress(steps done, steps of this
    phase). An interrupt (Ctrl-C) returns the best placement so far. The same problem gives the same answer unless the
    clock ended the search. Raises MoeccError if the independent check disagrees with the solver.
    """
    started = time.monotonic()
    clock = Clock(deadline=started + problem.time_limit_s)
    work = begin(problem, clock, progress or _silent)
    if start is not None:
        start_from(work, start)
    if problem.max_moves is not None:
        start_in_force(work)
    placement = to_placement(problem, [(layer.experts, layer.device_of) for layer in work.layers])
    timed = time.monotonic()
    objective_of(
        placement, problem, evaluate_all(placement, problem.workloads, problem.execution, problem.links)
    )
    imbalance_of(placement, problem)
    # The result is judged once more at the end, by the check and by the solver: that time is kept free.
    clock.deadline -= 2.5 * (time.monotonic() - timed) + 0.01
    interrupted = False
    try:
        with Team(problem.workers) as team:
            _improve(work, team)
    except KeyboardInterrupt:
        interrupted = True
    placement = to_placement(problem, [(layer.experts, layer.device_of) for layer in work.layers])
    if problem.in_force is not None:
        placement = _from_in_force(work, problem.in_force, placement)
    evaluation = evaluate_all(placement, problem.workloads, problem.execution, problem.links)
    imbalance = imbalance_of(placement, problem)
    objective = objective_of(placement, problem, evaluation)
    _require_agreement(work, objective, imbalance)
    if interrupted:
        work.notes.append(INTERRUPTED)
    certificate = _certify(work, objective, imbalance, interrupted or clock.cut, started)
    return Solution(placement=placement, certificate=certificate)


def _improve(work: Work, team: Team) -> None:
    problem = work.problem
    if problem.max_moves is not None:
        search_within(work)
        prove(work)
        return
    reachable = _balance(work, team)
    if problem.objective == "traffic" and reachable:
        if problem.execution == "home":
            team.run(work, search_home)
        elif not chained(work):
            search_migrate(work)
    if problem.objective == "step" and reachable:
        team.run(work, search_step)
    prove(work)
    searched = problem.objective == "step" or (problem.objective == "traffic" and reachable)
    if problem.linked and not searched:
        team.run(work, label_devices)
    if problem.execution == "migrate" and problem.objective == "traffic":
        join_nodes(work)


def _balance(work: Work, team: Team) -> bool:
    """As even as the objective or the cap asks for, no more: traffic is searched from there. False if over the cap."""
    problem, cap = work.problem, work.problem.max_imbalance
    if cap is not None and problem.objective != "load":
        team.run(work, partial(balance, stop_at=cap))
        if any(layer.imbalance > cap for layer in work.layers):
            team.run(work, partial(balance, stop_at=1.0))
    elif problem.objective == "load":
        if not (problem.near or problem.lp):
            # It lists splits of loads that units carry with them.
            team.run(work, partial(share_out, stop_at=1.0))
        team.run(work, partial(balance, stop_at=1.0))
    return cap is None or spread_cap(work, cap)


def _from_in_force(work: Work, in_force: Placement, placement: Placement) -> Placement:
    """With devices named after those that hold most of their experts already; the budget is checked."""
    problem = work.problem
    if problem.max_moves is None:
        placement = match_devices(problem, in_force, placement)
        start_from(work, placement)
    moved = moved_experts(in_force, placement)
    if problem.max_moves is not None and moved > problem.max_moves:
        raise MoeccError(
            f"the solver moves {moved} experts, {problem.max_moves} are allowed",
            where="placement",
            hint="this is a bug of moecc: please report it with the problem's seed and trace",
        )
    work.notes.append(f"moves {moved} of {placement.layers * placement.slots} experts")
    return placement


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def _solver_objective(work: Work) -> float:
    problem = work.problem
    if problem.objective == "load":
        return work.mean_imbalance
    if problem.objective == "step":
        return float(np.mean([layer_us(work, index) for index in range(problem.layers)]))
    if problem.execution == "home":
        return float(np.mean([home_cost(work, index) for index in range(problem.layers)]))
    return summed_hops(work) / max(1, problem.layers - 1)


def _require_agreement(work: Work, objective: float, imbalance: float) -> None:
    for what, own, checked in (
        ("objective", _solver_objective(work), objective),
        ("imbalance", work.mean_imbalance, imbalance),
    ):
        if abs(own - checked) > 1e-9 * max(1.0, abs(checked)):
            raise MoeccError(
                f"the solver claims {what} {own!r}, the check finds {checked!r}",
                where="placement",
                hint="this is a bug of moecc: please report it with the problem's seed and trace",
            )


def _certify(work: Work, objective: float, imbalance: float, cut: bool, started: float) -> Certificate:
    problem, notes = work.problem, list(work.notes)
    bound = _bound(work, objective)
    if bound is None:
        notes.append("no useful bound at this size")
    status: Status = "time_limit" if cut else "feasible"
    if bound is not None and objective <= bound + 1e-9 * max(1.0, abs(bound)):
        bound, status = min(bound, objective), "optimal"
    cap = problem.max_imbalance
    if cap is not None and imbalance > cap + 1e-9:
        status = "infeasible"
        lowest = float(np.mean([lower_bound(layer.table, problem.slots_per_device) for layer in work.layers]))
        if problem.objective == "load" and bound is not None:
            lowest = max(lowest, bound)
        proven = work.proven_infeasible or lowest > cap + 1e-9
        notes.append(
            f"max_imbalance {cap:g} is not met: imbalance {imbalance:.6g}; "
            + ("proven impossible" if proven else "the search found nothing lower, which proves nothing")
        )
        if problem.objective != "load":
            bound = None
    gap = None if bound is None else 0.0 if status == "optimal" else max(0.0, (objective - bound) / objective)
    return Certificate(
        objective=objective,
        bound=bound,
        gap=gap,
        status=status,
        solver=f"tabu swaps + CP-SAT on {work.exact_layers} of {problem.layers} layers"
        if work.exact_layers
        else "tabu swaps",
        wall_s=time.monotonic() - started,
        seed=problem.seed,
        note="; ".join(notes),
    )


def _bound(work: Work, objective: float) -> float | None:
    """The best lower bound known: CP-SAT's, the load bound, or a trivial one where it is met."""
    problem = work.problem
    # A token reaches at least the devices that its experts fill.
    least: float = -(-problem.top_k // problem.slots_per_device) if problem.execution == "home" else 0
    if problem.linked and problem.objective == "traffic":
        least = least_link_cost(problem)
    if work.proven is not None:
        return max(float(least), work.proven) if problem.objective == "traffic" else work.proven
    if problem.objective == "load":
        width = problem.slots_per_device
        return float(
            np.mean(
                [
                    max(lower_bound(layer.table, width), bound or 1.0)
                    for layer, bound in zip(work.layers, work.bounds, strict=True)
                ]
            )
        )
    if problem.objective == "step":
        lowest = least_us(work)
        return float(
            np.mean(
                [max(lowest_us, bound or 0.0) for lowest_us, bound in zip(lowest, work.bounds, strict=True)]
            )
        )
    known = [bound for bound in work.bounds if bound is not None]
    if len(known) == problem.layers:
        return float(np.mean([max(float(least), bound) for bound in known]))
    return float(least) if objective <= least + TOLERANCE else None
