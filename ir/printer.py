"""IR to text. Attributes at their default and names that are free already are left as they are."""

from __future__ import annotations

import json
import re
from typing import Any

from moecc.errors import Location
from moecc.ir.core import Function, Module, Op, Value

INDENT = "  "


def print_module(module: Module) -> str:
    functions = "\n\n".join(print_function(function) for function in module.functions)
    lines = [
        f"{INDENT * 2}{_key(k)} = {print_attribute(v, INDENT * 2)}" for k, v in module.attributes.items()
    ]
    attributes = " {\n" + ",\n".join(lines) + f"\n{INDENT}}}" if lines else ""
    return f"module @{module.name}{attributes} {{\n{functions}\n}}\n"


def print_function(function: Function) -> str:
    names = _unique_names(function)
    arguments = ",\n".join(f"{INDENT * 3}%{names[a]}: {a.type}" for a in function.arguments)
    head = f"{INDENT}func @{function.name}(\n{arguments}\n{INDENT})"
    head += f"{_attributes(function.attributes, INDENT)}{_location(function.location)} {{"
    lines = [INDENT * 2 + _print_op(op, names) for op in function.ops]
    returned = ", ".join(f"%{names[value]}" for value in function.returns)
    return "\n".join([head, *lines, f"{INDENT * 2}return {returned}", f"{INDENT}}}"])


def _print_op(op: Op, names: dict[Value, str]) -> str:
    operands = ", ".join(
        _operand(op, f.name, f.arity, names) for f in op.operand_fields if f.name in op.operands
    )
    given = ((f.name, op.attributes[f.name], f.default) for f in op.attribute_fields)
    changed = {name: value for name, value, default in given if value != default}
    results = ", ".join(f"%{names[value]}" for value in op.all_results)
    types = ", ".join(str(value.type) for value in op.all_results)
    left = f"{results} = " if results else ""
    right = f" : {types}" if types else ""
    return f"{left}{op.mnemonic}({operands}){_attributes(changed, INDENT * 2)}{right}{_location(op.location)}"


def _operand(op: Op, name: str, arity: str, names: dict[Value, str]) -> str:
    values = [f"%{names[value]}" for value in op.operands[name]]
    return f"{name} = [{', '.join(values)}]" if arity == "many" else f"{name} = {values[0]}"


def _attributes(attributes: dict[str, Any], indent: str) -> str:
    return f" {print_attribute(attributes, indent)}" if attributes else ""


def print_attribute(value: Any, indent: str = "") -> str:
    """Plain data as text: like JSON, with `key = value`, and one inner list a line in a list of lists."""
    if isinstance(value, dict):
        pairs = [f"{_key(key)} = {print_attribute(item, indent + INDENT)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        items = [print_attribute(item, indent + INDENT) for item in value]
        if len(value) > 1 and all(isinstance(item, (list, dict)) for item in value):
            return "[\n" + ",\n".join(f"{indent}{INDENT}{item}" for item in items) + f"\n{indent}]"
        return "[" + ", ".join(items) + "]"
    return json.dumps(value, allow_nan=False)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_]\w*", key) else json.dumps(key)


def _location(location: Location | None) -> str:
    return f" loc({json.dumps(location.file)}:{location.line}:{location.column})" if location else ""


def _unique_names(function: Function) -> dict[Value, str]:
    names: dict[Value, str] = {}
    taken: set[str] = set()
    for value in [*function.arguments, *(v for op in function.ops for v in op.all_results)]:
        stem = re.sub(r"_\d+$", "", value.name)
        name, suffix = value.name, 0
        while name in taken:
            suffix += 1
            name = f"{stem}_{suffix}"
        taken.add(name)
        names[value] = name
    return names
