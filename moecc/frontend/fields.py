"""A JSON object that knows where its fields stand, and typed access to them under our own names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import InputError, Location
from moecc.frontend.yaml_loader import describe

MAX_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class JsonObject:
    """A parsed file; `locations` has the value of every outermost key."""

    file: str
    data: Mapping[str, object]
    locations: Mapping[str, Location]


def load_json(path: Path) -> JsonObject:
    """The object in a JSON file. Errors: InputError with line and column for anything malformed."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"cannot be read: {reason}",
            where=str(path),
            hint="give a config.json or the folder that holds one",
        ) from None
    if len(raw) > MAX_BYTES:
        raise InputError(
            f"the file is larger than {MAX_BYTES} bytes", where=str(path), hint="give a config.json"
        )
    return parse_json(raw, str(path))


def parse_json(raw: bytes, file: str) -> JsonObject:
    """The object in a JSON text (UTF-8), see `load_json`."""
    start = Location(file, 1, 1)
    try:
        text = raw.decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - raw[: error.start].rfind(b"\n")
        raise InputError(
            f"the byte 0x{raw[error.start]:02x} is not UTF-8",
            where=Location(file, line, column),
            hint="save the file as UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"malformed JSON: {error.msg.lower()}",
            where=Location(file, error.lineno, error.colno),
            hint="mend the JSON, or download the config.json again",
        ) from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply", where=start, hint="give a config.json") from None
    except ValueError as error:
        raise InputError(str(error), where=start, hint="mend the JSON") from None
    if not isinstance(data, dict):
        raise InputError(
            f"a JSON object is expected, not {describe(data)}", where=start, hint="give a config.json"
        )
    return JsonObject(file=file, data=data, locations=_outer_locations(text, file))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' is written twice")
    return data


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not allowed")


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^\s{}\[\],:"]+')


def _outer_locations(text: str, file: str) -> dict[str, Location]:
    """Where the value of each outermost key starts; `text` is known to be a JSON object."""
    locations: dict[str, Location] = {}
    depth, key, line, line_start, scanned = 0, None, 1, 0, 0
    for token in _TOKEN.finditer(text):
        line += text.count("\n", scanned, token.start())
        line_start = max(line_start, text.rfind("\n", scanned, token.start()) + 1)
        scanned = token.start()
        word = token.group()
        if depth == 1 and word not in "}]":
            if key is None:
                key = json.loads(word)
            else:
                locations[key] = Location(file, line, token.start() - line_start + 1)
                key = None
        depth += (word in "{[") - (word in "}]")
    return locations


class Fields:
    """Typed access to a config.json under the names of `ModelSpec`.

    keys: our name -> the names it may have in the file, the first one preferred; a name that is not listed is
    the same in both. A field that is absent or null takes the default given, which must be what transformers
    takes it for.
    """

    def __init__(self, document: JsonObject, keys: Mapping[str, Sequence[str]]) -> None:
        self.document = document
        self.keys = keys
        self.locations: dict[str, Location | str] = dict(document.locations)
        for name, spellings in keys.items():
            for spelling in reversed(spellings):
                if spelling in document.locations:
                    self.locations[name] = document.locations[spelling]

    def require(self, *names: str) -> None:
        """Errors: one InputError that names all fields of `names` that are absent or null."""
        missing = [self._spellings(name)[0] for name in names if self.get(name) is None]
        if missing:
            noun = "field is" if len(missing) == 1 else "fields are"
            raise InputError(
                f"{len(missing)} {noun} missing for family '{self.document.data.get('model_type')}': "
                + ", ".join(missing),
                where=self.document.file,
                hint="download the model's config.json again, or write the fields inline in model.yaml",
            )

    def get(self, name: str) -> object:
        """The raw value, None when absent. Errors: two spellings of one field that disagree."""
        found = [s for s in self._spellings(name) if self.document.data.get(s) is not None]
        values = [self.document.data[s] for s in found]
        if any(value != values[0] for value in values[1:]):
            raise InputError(
                f"{found[0]} and {found[1]} disagree", where=self.at(name), hint=f"remove {found[1]}"
            )
        return values[0] if values else None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.get(name) if self.get(name) is not None else default
        if type(value) is not int:
            raise self.error(name, f"must be an integer, not {describe(value)}", "write a JSON integer")
        if value < minimum:
            raise self.error(name, f"{value} is too small", f"it must be at least {minimum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str, default: float) -> float:
        value = self.get(name) if self.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"must be a finite number, not {describe(value)}", "write a JSON number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name) if self.get(name) is not None else default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {describe(value)}", "write true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name) if self.get(name) is not None else default
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, not {describe(value)}", "write a JSON string")
        return value

    def listed(self, name: str, kind: type, default: Sequence[object]) -> tuple[object, ...]:
        """A list whose items are all exactly of `kind`."""
        value = self.get(name) if self.get(name) is not None else default
        if not isinstance(value, (list, tuple)) or any(type(item) is not kind for item in value):
            raise self.error(
                name, f"must be a list of {kind.__name__}, not {describe(value)}", "write a JSON list"
            )
        return tuple(value)

    def at(self, name: str) -> Location | str:
        return next(
            (self.document.locations[s] for s in self._spellings(name) if s in self.document.locations),
            self.document.file,
        )

    def error(self, name: str, what: str, hint: str) -> InputError:
        spelling = next((s for s in self._spellings(name) if s in self.document.data), name)
        return InputError(f"{spelling} {what}", where=self.at(name), hint=hint)

    def _spellings(self, name: str) -> Sequence[str]:
        return self.keys.get(name, (name,))
