"""Which device holds which expert: fewest devices per token, fewest hops, or best balance, with a proof."""

from moecc.solvers.placement.check import Evaluation, Metrics, evaluate, evaluate_all
from moecc.solvers.placement.moves import MovePlan, plan_moves
from moecc.solvers.placement.placement import Certificate, Placement, Solution
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.solve import solve
from moecc.solvers.placement.start import identity

__all__ = [
    "Certificate",
    "Evaluation",
    "Metrics",
    "MovePlan",
    "Placement",
    "PlacementProblem",
    "Solution",
    "evaluate",
    "evaluate_all",
    "identity",
    "plan_moves",
    "solve",
]
