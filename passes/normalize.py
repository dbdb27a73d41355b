"""One form for what means the same."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir.core import Function, Module, Op
from moecc.ir.ops import Dispatch, Residual, Route
from moecc.ir.printer import print_function
from moecc.ir.rewriter import Replacement, Rule, rewrite
from moecc.passes.manager import Context


def drop_idle_group_limit(op: Op, function: Function) -> Replacement | None:
    """A limit to all groups limits nothing."""
    if not isinstance(op, Route) or op.groups == 1 or op.top_groups < op.groups:
        return None
    new = op.rebuilt({}, {"groups": 1, "top_groups": 1, "group_score": "max"})
    return Replacement([new], dict(zip(op.all_results, new.all_results, strict=True)))


def drop_idle_normalize(op: Op, function: Function) -> Replacement | None:
    """`select_first` ends the procedure before anything is normalised."""
    if not isinstance(op, Route) or not (op.select_first and op.normalize):
        return None
    new = op.rebuilt({}, {"normalize": False, "norm_eps": 0.0, "norm_min": 0.0})
    return Replacement([new], dict(zip(op.all_results, new.all_results, strict=True)))


def flatten_residual(op: Op, function: Function) -> Replacement | None:
    """A sum of sums is one sum; a sum of one part is the part."""
    if not isinstance(op, Residual):
        return None
    if len(op.parts) == 1:
        return Replacement([], {op.total: op.parts[0]})
    inner = next((part.op for part in op.parts if isinstance(part.op, Residual)), None)
    if inner is None:
        return None
    parts = [p for part in op.parts for p in (inner.parts if part.op is inner else (part,))]
    new = Residual({"parts": parts}, location=op.location)
    return Replacement([new], {op.total: new.total})


RULES = (
    Rule("drop-idle-group-limit", Route, drop_idle_group_limit),
    Rule("drop-idle-normalize", Route, drop_idle_normalize),
    Rule("flatten-residual", Residual, flatten_residual),
)


class Normalize:
    """Contract: layers of equal shape share one function that lists them in `layers`, in the order of the model;
    routers and residuals are in canonical form; nothing is dead.

    Pseudo-code: rewrite every function by RULES; group functions whose text without name, layers and locations
    is equal; keep the first of each group, named after its kind.
    """

    name = "normalize"

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions:
            if "phase" in function.attributes:
                hint = "run 'normalize' first"
                raise InputError(f"@{function.name} is scheduled already", where=function.location, hint=hint)
        groups: dict[str, list[Function]] = {}
        for function in module.functions:
            rewrite(function, RULES)
            groups.setdefault(_shape(function), []).append(function)
        module.functions = [_merged(group) for group in groups.values()]
        _name_by_kind(module.functions)


def _shape(function: Function) -> str:
    """The function's text without what may differ between equal layers."""
    attributes = {name: value for name, value in function.attributes.items() if name != "layers"}
    located = [(op, op.location) for op in function.ops]
    for op, _ in located:
        op.location = None
    text = print_function(
        Function("layer", function.arguments, function.ops, function.returns, attributes, location=None)
    )
    for op, location in located:
        op.location = location
    return text


def _merged(group: list[Function]) -> Function:
    first = group[0]
    first.attributes["layers"] = sorted(layer for f in group for layer in f.attributes.get("layers", []))
    return first


def _name_by_kind(functions: list[Function]) -> None:
    kinds = ["moe" if function.first(Dispatch) else "dense" for function in functions]
    for index, (function, kind) in enumerate(zip(functions, kinds, strict=True)):
        several = kinds.count(kind) > 1
        function.name = f"{kind}{kinds[:index].count(kind)}" if several else kind
