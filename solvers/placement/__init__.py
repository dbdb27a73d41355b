"""Which device holds which expert: fewest devices per token, fewest hops, or best balance, with a proof."""

from moecc.solvers.placement.check import Evaluation, Metrics, evaluate, evaluate_all
from moecc.solvers.placement.dispatch import Dispatched, judge_dispatch
from moecc.solvers.placement.homes import Shuffle, aligned, shuffle
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.moves import MovePlan, plan_moves
from moecc.solvers.placement.placement import Certificate, Placement, Solution
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.solve import solve
from moecc.solvers.placement.start import identity
from moecc.solvers.placement.step_cost import StepCost

__all__ = [
    "Certificate",
    "Dispatched",
    "Evaluation",
    "Links",
    "Metrics",
    "MovePlan",
    "Placement",
    "PlacementProblem",
    "Shuffle",
    "Solution",
    "StepCost",
    "aligned",
    "evaluate",
    "evaluate_all",
    "identity",
    "judge_dispatch",
    "plan_moves",
    "shuffle",
    "solve",
]
