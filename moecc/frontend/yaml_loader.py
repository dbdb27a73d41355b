"""YAML that remembers where everything stands and refuses what a person did not mean to write.

Scalars follow the YAML 1.2 core schema, so `no` and `12:30` are strings and `1e-6` is a number. Refused, each at
its line and column: duplicate and non-string keys, aliases, tags, several documents, deep nesting, tabs as
indentation, control characters and bytes that are not UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from moecc.errors import InputError, Location

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A mapping as plain data; `values` and `keys` say where each value and each key stands, in a file or elsewhere."""

    file: str
    data: dict[str, object]
    values: Mapping[KeyPath, Location | str]
    keys: Mapping[KeyPath, Location | str]

    def value_at(self, path: KeyPath) -> Location | str:
        """Where the value stands, or the nearest key around it when it was not written."""
        if path in self.values:
            return self.values[path]
        while path:
            path = path[:-1]
            if path in self.keys:
                return self.keys[path]
        return Location(self.file, 1, 1)

    def dotted(self) -> dict[str, Location | str]:
        """The locations of values under dotted names, as in "workloads.0.trace"."""
        return {".".join(map(str, path)): where for path, where in self.values.items()}


class _RefusedError(Exception):
    """Valid YAML that this loader does not take."""

    def __init__(self, message: str, event: yaml.Event, hint: str) -> None:
        super().__init__(message)
        mark = event.start_mark
        self.line, self.column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        self.hint = hint


class _Loader(yaml.SafeLoader):
    """Composes nodes only: our own reader turns them into data."""

    # mypy: the stubs declare the resolver table on the class it is inherited from
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"the alias *{event.anchor} is not allowed", event, "write the value out")
        if self.depth >= MAX_DEPTH:
            raise _RefusedError(
                f"nesting is deeper than {MAX_DEPTH} levels", event, "a model.yaml needs four levels"
            )
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Document:
    """The mapping in a YAML file. Errors: InputError with line and column for anything malformed."""
    file = str(path)
    text = _read_text(path)
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        raise InputError(
            f"the character {chr(int(error.character))!r} is not allowed in YAML",
            where=_place(file, text, error.position),
            hint="remove it",
        ) from None
    except _RefusedError as error:
        where = Location(file, error.line, error.column)
        raise InputError(str(error), where=where, hint=error.hint) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(file, error) from None
    if root is None:
        raise InputError("the file is empty", where=Location(file, 1, 1), hint="start it with 'moecc: 1'")
    reader = _Reader(file)
    data = reader.read(root, ())
    if not isinstance(data, dict):
        raise InputError(
            f"a mapping is expected, not {describe(data)}",
            where=Location(file, 1, 1),
            hint="write 'key: value' lines",
        )
    return Document(file=file, data=data, values=reader.values, keys=reader.keys)


def describe(value: object) -> str:
    """A value as an error names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f"the string '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, (int, float)):
        return f"the number {value:.12g}" if abs(value) < 1e300 else "a huge number"
    return "a list" if isinstance(value, list) else "a mapping"


class _Reader:
    """Turns YAML nodes into data and writes down where each stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.values: dict[KeyPath, Location] = {}
        self.keys: dict[KeyPath, Location] = {}

    def read(self, node: yaml.Node, path: KeyPath) -> object:
        self.values[path] = self._at(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._tag_error(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._mapping(node, path)

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, object]:
        data: dict[str, object] = {}
        for key_node, value_node in node.value:
            where = self._at(key_node)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise InputError("a key must be a string", where=where, hint="put it in quotes, or remove it")
            if key in data:
                first = self.keys[(*path, key)]
                raise InputError(
                    f"the key '{key}' is written twice, first in line {first.line}",
                    where=where,
                    hint="remove one of them",
                )
            self.keys[(*path, key)] = where
            data[key] = self.read(value_node, (*path, key))
        return data

    def _scalar(self, node: yaml.ScalarNode) -> object:
        text = str(node.value)
        match node.tag.rpartition(":")[2]:
            case "str":
                return text
            case "null" if node.style is None and text in ("~", "null", "Null", "NULL", ""):
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" if re.fullmatch(r"[-+]?[0-9]{1,18}", text):
                return int(text)
            case "int" if re.fullmatch(r"[-+]?[0-9]+", text):
                raise InputError(
                    "the number is too large", where=self._at(node), hint="write a smaller number"
                )
            case "float" if re.fullmatch(r"[-+.0-9eE]+", text):
                return float(text)
        raise self._tag_error(node)

    def _tag_error(self, node: yaml.Node) -> InputError:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        return InputError(f"the tag {tag} is not allowed", where=self._at(node), hint="write the plain value")

    def _at(self, node: yaml.Node) -> Location:
        return Location(self.file, node.start_mark.line + 1, node.start_mark.column + 1)


def _read_text(path: Path) -> str:
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"cannot be read: {reason}", where=file, hint="give the path of a model.yaml"
        ) from None
    if len(raw) > MAX_BYTES:
        raise InputError(
            f"the file is larger than {MAX_BYTES} bytes", where=file, hint="give the path of a model.yaml"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        raise InputError(
            f"the byte 0x{raw[error.start]:02x} is not UTF-8",
            where=_place(file, before, len(before)),
            hint="save the file as UTF-8",
        ) from None


def _place(file: str, text: str, position: int) -> Location:
    before = text[:position]
    return Location(file, before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)


_SYNTAX_HINTS = (
    ("found character '\\t'", "", "indent with spaces, not tabs"),
    (
        "but found another document",
        "a second document begins here",
        "keep one document and remove the line '---'",
    ),
    ("mapping values are not allowed here", "", "indent the line, or quote a value that holds ': '"),
)


def _syntax_error(file: str, error: yaml.MarkedYAMLError) -> InputError:
    mark = error.problem_mark or error.context_mark
    where = Location(file, mark.line + 1, mark.column + 1) if mark else Location(file, 1, 1)
    problem = error.problem or "malformed YAML"
    for start, better, hint in _SYNTAX_HINTS:
        if problem.startswith(start):
            return InputError(better or problem, where=where, hint=hint)
    return InputError(problem, where=where, hint="close quotes and brackets, and indent with spaces")
