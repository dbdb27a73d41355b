"""Proven optima of small placements by CP-SAT (OR-Tools): what is worth proving, and what the proof is used for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.solvers.placement.balance import Ints
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.cpsat import WORK, Proof, solve_layers
from moecc.solvers.placement.home import home_cost, patterns
from moecc.solvers.placement.layers import Work, remaining
from moecc.solvers.placement.migrate import summed_hops
from moecc.solvers.placement.proofs import prove_chain, prove_steps
from moecc.solvers.placement.search import TOLERANCE
from moecc.solvers.placement.whole import prove_whole

MAX_EXPERTS, MAX_DEVICES, MAX_PATTERNS = 16, 4, 300
MAX_MIGRATE_EXPERTS, MAX_MIGRATE_DEVICES, MAX_COUPLED_LAYERS = 6, 3, 3
IMPORT_ALLOWANCE_S = 1.0
"""Loading OR-Tools was measured at 0.4 to 0.7 s here and reported at 5 s elsewhere; shorter limits skip the proof."""


def prove(work: Work) -> None:
    """Improve and certify what is small enough; everything else is left as it is."""
    problem = work.problem
    if problem.objective == "step":
        if work.kept is None:
            prove_steps(work)
        return
    if work.proven is not None:
        return
    linked = problem.linked and problem.objective == "traffic"
    enumerable = work.kept is None and problem.execution == "home"
    if enumerable and (problem.objective == "traffic" or problem.near or problem.lp) and prove_whole(work):
        return
    if linked or problem.near or problem.lp:
        # The model of CP-SAT takes devices for interchangeable and replicas for alike.
        return
    everything = range(problem.layers)
    # Landings couple layers, and so do a cap on their mean and a budget of moves: then all layers are proven together.
    coupled = problem.objective == "traffic" and problem.layers > 1
    coupled &= problem.execution == "migrate" or problem.max_imbalance is not None
    coupled |= work.kept is not None and problem.layers > 1
    if coupled and problem.layers > MAX_COUPLED_LAYERS:
        return
    groups = [list(everything)] if coupled else [[index] for index in everything]
    for count, group in enumerate(groups):
        if not _fits(work, group) or _settled(work, group):
            continue
        if remaining(work.clock) < IMPORT_ALLOWANCE_S:
            work.notes.append("too little time was left for the exact solver")
            work.clock.cut = True
            return
        until = work.clock.slice(len(groups) - count)
        proof = solve_layers(work, group, WORK / len(groups), until)
        _use(work, group, proof)
        work.tick(count + 1, len(groups))


def chained(work: Work) -> bool:
    """Whether `migrate` was solved along the chain of layers; neither a cap nor a budget may couple them further."""
    free = work.problem.max_imbalance is None and work.kept is None
    return free and work.problem.layers > 1 and prove_chain(work)


def _fits(work: Work, group: Sequence[int]) -> bool:
    problem = work.problem
    if problem.objective == "load":
        return problem.num_experts <= MAX_EXPERTS and problem.devices <= MAX_DEVICES
    if problem.execution == "migrate":
        return problem.num_experts <= MAX_MIGRATE_EXPERTS and problem.devices <= MAX_MIGRATE_DEVICES
    small = problem.num_experts <= MAX_EXPERTS and problem.devices <= MAX_DEVICES
    return small and sum(len(patterns(work, index)[0]) for index in group) <= MAX_PATTERNS


def _settled(work: Work, group: Sequence[int]) -> bool:
    """Whether the cheap load bound is met already, so that nothing is left to prove."""
    width = work.problem.slots_per_device
    layers = [work.layers[index] for index in group]
    return work.problem.objective == "load" and all(
        layer.imbalance <= lower_bound(layer.table, width) + TOLERANCE for layer in layers
    )


def _use(work: Work, group: Sequence[int], proof: Proof) -> None:
    work.exact_layers += len(group)
    work.proven_infeasible |= proof.infeasible
    work.clock.cut |= proof.cut
    if len(group) == 1:
        work.bounds[group[0]] = proof.bound
    elif proof.bound is not None:
        hops = work.problem.execution == "migrate" and work.problem.objective == "traffic"
        work.proven = proof.bound / (len(group) - hops)
    if proof.layers is not None:
        _keep_better(work, group, proof.layers)


def _keep_better(work: Work, group: Sequence[int], found: list[tuple[Ints, Ints]]) -> None:
    saved = [(work.layers[index].experts, work.layers[index].device_of) for index in group]
    before = _rank(work, group)
    better = False
    try:
        _put(work, group, found)
        better = _rank(work, group) < before
    finally:
        if not better:
            _put(work, group, saved)


def _rank(work: Work, group: Sequence[int]) -> tuple[float, float]:
    """Imbalance over the cap first, then the group's objective, each rounded so that equal ones compare equal."""
    problem, cap = work.problem, work.problem.max_imbalance
    imbalance = float(np.mean([work.layers[index].imbalance for index in group]))
    over = 0.0 if cap is None or problem.objective == "load" else max(0.0, imbalance - cap)
    if problem.objective == "load":
        objective = imbalance
    elif problem.execution == "home":
        objective = float(np.mean([home_cost(work, index) for index in group]))
    else:
        objective = summed_hops(work)
    return round(over, 11), round(objective, 11)


def _put(work: Work, group: Sequence[int], layers: list[tuple[Ints, Ints]]) -> None:
    for index, (experts, device_of) in zip(group, layers, strict=True):
        work.layers[index].experts, work.layers[index].device_of = experts, device_of
