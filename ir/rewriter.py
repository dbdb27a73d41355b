"""Rewrite rules as data: `Rule(name, anchor, rewrite)`, applied until nothing matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moecc.errors import MoeccError
from moecc.ir.core import Function, Op, Value
from moecc.ir.ops import Launch

_LIMIT = 10_000


@dataclass(frozen=True)
class Replacement:
    """New ops that stand where the anchor stood, and the values that take the place of old ones."""

    ops: Sequence[Op]
    values: Mapping[Value, Value]


@dataclass(frozen=True)
class Rule:
    """`rewrite` gets an op of type `anchor` and its function and returns None when it does not match."""

    name: str
    anchor: type[Op]
    rewrite: Callable[[Op, Function], Replacement | None]


def rewrite(function: Function, rules: Sequence[Rule]) -> list[str]:
    """Applies the rules in place until none matches; returns the names of those applied, in order."""
    applied: list[str] = []
    while (name := _rewrite_once(function, rules)) is not None:
        applied.append(name)
        if len(applied) > _LIMIT:
            raise MoeccError(f"rules {sorted(set(applied))} do not terminate on @{function.name}")
    remove_dead(function)
    return applied


def _rewrite_once(function: Function, rules: Sequence[Rule]) -> str | None:
    for op in function.ops:
        for rule in rules:
            if not isinstance(op, rule.anchor):
                continue
            if (replacement := rule.rewrite(op, function)) is not None:
                _replace(function, op, replacement)
                return rule.name
    return None


def _replace(function: Function, anchor: Op, replacement: Replacement) -> None:
    index = function.ops.index(anchor)
    function.ops[index : index + 1] = replacement.ops
    for op in replacement.ops:
        op.location = op.location or anchor.location
    replace_values(function, replacement.values)


def replace_values(function: Function, values: Mapping[Value, Value]) -> None:
    """Makes every user of an old value use the new one."""
    for op in function.ops:
        op.operands = {name: tuple(values.get(v, v) for v in bound) for name, bound in op.operands.items()}
    function.returns = [values.get(value, value) for value in function.returns]


def uses(function: Function, value: Value) -> list[Op]:
    """Ops that read the value, once each."""
    return [op for op in function.ops if value in op.all_operands]


def remove_dead(function: Function) -> None:
    """Drops ops whose results nobody reads; launches stay, for they fill buffers."""
    live = set(function.returns)
    kept = []
    for op in reversed(function.ops):
        if isinstance(op, Launch) or any(value in live for value in op.all_results):
            kept.append(op)
            live.update(op.all_operands)
    function.ops[:] = reversed(kept)
