"""What a placement was not asked for and what its search did not see: said before anybody uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecc.solvers.placement.problem import PlacementProblem

JUDGED_ONLY = {
    "lp": "loads were balanced for an even split over replicas, which the LP never exceeds",
    "nearest": "loads were balanced for an even split over replicas",
}


def cautions(problem: PlacementProblem, in_sample: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """in_sample: the figures of identity, `before`, and of the placement, `after`, on what was solved on."""
    return [*_uneven(problem, in_sample), *_unseen_dispatch(problem)]


def _uneven(problem: PlacementProblem, in_sample: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if problem.max_imbalance is not None or problem.objective == "load":
        return []
    before, after = (in_sample[side]["balance_imbalance"] for side in ("before", "after"))
    if after <= before + 1e-9:
        return []
    return [
        f"imbalance {after:.3f} is above identity's {before:.3f}: without max_imbalance {problem.objective} alone"
        f" counts; set it, such as to {before:.2f}"
    ]


def _unseen_dispatch(problem: PlacementProblem) -> list[str]:
    # In one node, with homes on all devices alike, `nearest` comes to an even split.
    counted = problem.dispatch == "nearest" and problem.execution == "home" and problem.objective != "step"
    counted |= problem.lp
    if counted or problem.dispatch not in JUDGED_ONLY or problem.slots == problem.num_experts:
        return []
    return [f"dispatch {problem.dispatch} is judged, not searched: {JUDGED_ONLY[problem.dispatch]}"]
