"""What must hold of every module, whatever pass made it."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir.core import Function, Module, Op, Value, check_fields


def verify(module: Module) -> None:
    """Values are defined before use, ops are as declared, result types follow from operands.

    Raises InputError at the location of the first op that is wrong.
    """
    names = [function.name for function in module.functions]
    for function in module.functions:
        if names.count(function.name) > 1:
            raise InputError(f"function @{function.name} stands twice", where=function.location)
        _verify_function(function)


def _verify_function(function: Function) -> None:
    layers = function.attributes.get("layers", [])
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise InputError(
            f"attribute 'layers' of @{function.name} must be a list of layer indices", where=function.location
        )
    defined: set[Value] = set(function.arguments)
    for op in function.ops:
        _verify_op(op, defined)
        defined.update(op.all_results)
    for value in function.returns:
        if value not in defined:
            raise InputError(
                f"@{function.name} returns %{value.name}, which is not defined", where=function.location
            )


def _verify_op(op: Op, defined: set[Value]) -> None:
    check_fields(op)
    for value in op.all_operands:
        if value not in defined:
            raise op.fail(f"%{value.name} is used before it is defined")
    inferred = [type for type in op.infer() if type is not None]
    found = [value.type for value in op.all_results]
    if inferred != found:
        raise op.fail(f"result types are {', '.join(map(str, inferred))}, not {', '.join(map(str, found))}")
