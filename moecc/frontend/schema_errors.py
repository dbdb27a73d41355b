"""The first thing pydantic found wrong, as one located line with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from moecc.errors import InputError, Location
from moecc.frontend.checks import closest_hint
from moecc.frontend.yaml_loader import Document, KeyPath, describe

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_WRITE = {
    "an integer": "write an integer without quotes and without a point",
    "a number": "write a number without quotes",
    "a finite number": "write a smaller number",
    "true or false": "write true or false without quotes",
    "a string": "put it in quotes",
    "a list": "write [..., ...]",
    "a mapping": "write 'key: value' lines below it",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{name} must be at least {bound}"),
    "greater_than": ("gt", "{name} must be larger than {bound}"),
    "less_than": ("lt", "{name} must be smaller than {bound}"),
}
_NOTED = {
    "bias": "none, logits (added before scoring, gpt-oss), selection (for selection only, DeepSeek-V3) or both"
}


_MISSING_HINTS: dict[KeyPath, str] = {
    ("moecc",): "start the file with 'moecc: 1'",
    ("model",): "write 'model: {preset: qwen3-30b-a3b}', or an hf_config, or the fields",
    ("cluster",): "write 'cluster: {device: h100-sxm, nodes: 1, devices_per_node: 8}'",
    ("model", "router"): "write 'router: {score: softmax, normalize: true}'",
}


def first_error(error: ValidationError, document: Document, schema: type[BaseModel]) -> InputError:
    """The error that stands first in the file; unknown keys go before what may be missing because of them."""
    items = error.errors(include_url=False)
    absent = [item["loc"] for item in items if item["type"] == "missing"]
    present = [item for item in items if item["type"] != "missing"]
    if not present:
        return _missing([loc for loc in absent if loc[:-1] == absent[0][:-1]], document)
    unknown = [item for item in present if item["type"] == "extra_forbidden"]
    errors = [_error(item, document, schema) for item in unknown or present]
    return min(errors, key=_order)


def _order(error: InputError) -> tuple[int, int]:
    where = error.where
    return (where.line, where.column) if isinstance(where, Location) else (0, 0)


def _missing(paths: list[KeyPath], document: Document) -> InputError:
    """Everything that is missing from one mapping, in one line."""
    names, path = [f"'{path[-1]}'" for path in paths], paths[0]
    verb = "is" if len(paths) == 1 else "are"
    hint = _MISSING_HINTS.get(path) or f"add the line {path[-1]}: ..."
    return InputError(
        f"{', '.join(names)} {verb} missing{_inside(path)}", where=document.value_at(path), hint=hint
    )


def _error(item: Any, document: Document, schema: type[BaseModel]) -> InputError:
    kind, path, value, context = item["type"], item["loc"], item["input"], item.get("ctx", {})
    if path not in document.values:  # `activation: silu_glu` is short for a mapping with a `kind`
        path = path[:-1]
    name = _name(path)
    where = document.value_at(path)
    if kind == "extra_forbidden":
        known = _fields_at(schema, path[:-1])
        return InputError(
            f"unknown key '{path[-1]}'{_inside(path)}",
            where=document.keys.get(path, where),
            hint=closest_hint(str(path[-1]), known),
        )
    if kind == "literal_error":
        return _literal_error(path, value, context, where)
    if kind in _EXPECTED:
        expected = _EXPECTED[kind]
        return InputError(
            f"{name} must be {expected}, not {describe(value)}", where=where, hint=_WRITE[expected]
        )
    if kind in _BOUNDS:
        key, text = _BOUNDS[kind]
        return InputError(
            f"{name} {value} is out of range", where=where, hint=text.format(name=name, bound=context[key])
        )
    if kind == "too_short":
        return InputError(f"{name} is empty", where=where, hint="list at least one, or leave the key out")
    return InputError(
        f"{name} is not a printable text", where=where, hint="write 1 to 4096 printable characters"
    )


def _literal_error(
    path: KeyPath, value: object, context: dict[str, Any], where: Location | str
) -> InputError:
    if path == ("moecc",):
        return InputError(
            f"format {describe(value)} is not supported", where=where, hint="this moecc reads 'moecc: 1'"
        )
    name = _name(path)
    known = [part.strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]
    hint = _NOTED.get(name) or closest_hint(value if isinstance(value, str) else "", known)
    return InputError(f"{name} cannot be {describe(value)}", where=where, hint=hint)


def _name(path: KeyPath) -> str:
    """The key that a person would call it by: an item of a list goes by the name of the list."""
    names = [part for part in path if isinstance(part, str)]
    return names[-1] if names else "the file"


def _inside(path: KeyPath) -> str:
    parent = ".".join(str(part + 1 if isinstance(part, int) else part) for part in path[:-1])
    return f" in {parent}" if parent else ""


def _fields_at(schema: type[BaseModel], path: KeyPath) -> list[str]:
    """Names of the fields of the mapping at `path`."""
    for part in path:
        annotation = schema.model_fields[part].annotation if isinstance(part, str) else schema
        schema = next(_models_in(annotation))
    return list(schema.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
