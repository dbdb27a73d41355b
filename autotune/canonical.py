"""One text for one value: the JSON that is hashed, signed and stored, and the reading of such texts without trust."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

from moecc.errors import InputError

Scalar = str | int | float | bool | None
MAX_TEXT = 512
"""Characters of a string, names of fields too."""
MAX_INTEGER = 1 << 53
"""Beyond it other readers of JSON round."""
_DIGEST_CHARACTERS = 32


def canonical(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. InputError for what has no such text: who needs one fails closed."""
    _check(value, "value")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(value: Any) -> str:
    """The first 128 bits of the SHA-256 of the canonical text, as 32 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()[:_DIGEST_CHARACTERS]


def is_digest(text: str) -> bool:
    return len(text) == _DIGEST_CHARACTERS and set(text) <= set("0123456789abcdef")


def parse(data: bytes) -> Any:
    """The value of a JSON text from elsewhere. ValueError, and no other, where it is none or has a field twice."""
    try:
        return json.loads(
            data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object_of_distinct
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_scalar(value: Any) -> TypeGuard[Scalar]:
    """Whether it is a finite number, a short text, a truth value or null."""
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int):
        return abs(value) <= MAX_INTEGER
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, str) and _is_text(value)


def _check(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str) or not _is_text(name):
                _refuse(where, name)
            _check(item, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not is_scalar(value):
        _refuse(where, value)


def _is_text(value: str) -> bool:
    return len(value) <= MAX_TEXT and value.isprintable()


def _refuse(where: str, value: Any) -> NoReturn:
    raise InputError(
        f"{type(value).__name__} {str(value)[:40]!r} has no canonical text",
        where=where,
        hint="use finite numbers, short printable strings, truth values, lists and objects of them",
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object_of_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found
