"""The chain gate -> route -> dispatch -> experts -> combine of one MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.core import Function
from moecc.ir.ops import Combine, Dispatch, Experts, Gate, Route
from moecc.ir.rewriter import uses

HINT = "write gate, route, dispatch, experts and combine as one chain"


@dataclass(frozen=True)
class RoutedPath:
    gate: Gate
    route: Route
    dispatch: Dispatch
    experts: Experts
    combine: Combine


def routed_path(function: Function) -> RoutedPath | None:
    """The function's routed path before communication is placed.

    None without experts. Raises InputError where the chain is another shape, so that it cannot be distributed.
    """
    combine = function.first(Combine)
    if combine is None:
        return None
    experts = combine.rows.op
    dispatch = experts.rows.op if isinstance(experts, Experts) else None
    route = dispatch.routing.op if isinstance(dispatch, Dispatch) else None
    gate = route.logits.op if isinstance(route, Route) else None
    if not (isinstance(experts, Experts) and isinstance(dispatch, Dispatch)):
        raise combine.fail("its rows do not come from experts behind a dispatch", HINT)
    if not (isinstance(route, Route) and isinstance(gate, Gate)):
        raise dispatch.fail("its routing does not come from a gate and a route", HINT)
    path = RoutedPath(gate, route, dispatch, experts, combine)
    _require_closed(function, path)
    return path


def _require_closed(function: Function, path: RoutedPath) -> None:
    """Nobody outside the path reads what is made inside, and both ends of it start from one value."""
    inside = set(map(id, vars(path).values()))
    for op in (path.gate, path.route, path.dispatch, path.experts):
        for value in op.all_results:
            if any(id(user) not in inside for user in uses(function, value)) or value in function.returns:
                raise op.fail(f"%{value.name} has readers outside the routed path", HINT)
    if path.dispatch.x is not path.gate.x:
        raise path.dispatch.fail("it dispatches another value than the gate reads", HINT)


def moe_layers(functions: list[Function]) -> list[int]:
    """Indices of all layers with experts, in the order of the model: the layers of a trace and a placement."""
    return sorted(layer for f in functions if f.first(Dispatch) for layer in f.attributes.get("layers", []))
