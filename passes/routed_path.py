"""The chain gate -> route -> dispatch -> experts -> combine of one MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.core import Function
from moecc.ir.ops import Combine, Dispatch, Experts, Gate, Route


@dataclass(frozen=True)
class RoutedPath:
    gate: Gate
    route: Route
    dispatch: Dispatch
    experts: Experts
    combine: Combine


def routed_path(function: Function) -> RoutedPath | None:
    """The function's routed path before communication is placed; None if there is none or it is another shape."""
    combine = function.first(Combine)
    experts = combine.rows.op if combine else None
    dispatch = experts.rows.op if isinstance(experts, Experts) else None
    route = dispatch.routing.op if isinstance(dispatch, Dispatch) else None
    gate = route.logits.op if isinstance(route, Route) else None
    if combine is None or not isinstance(experts, Experts) or not isinstance(dispatch, Dispatch):
        return None
    if not isinstance(route, Route) or not isinstance(gate, Gate):
        return None
    return RoutedPath(gate, route, dispatch, experts, combine)


def moe_layers(functions: list[Function]) -> list[int]:
    """Indices of all layers with experts, in the order of the model: the layers of a trace and a placement."""
    return sorted(layer for f in functions if f.first(Dispatch) for layer in f.attributes["layers"])
