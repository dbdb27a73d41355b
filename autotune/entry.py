"""Records as bytes, and bytes from anywhere as records: nothing is believed that is not checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from moecc.autotune.canonical import canonical, is_digest, parse
from moecc.autotune.key import Environment, Key, environment_of, key_of
from moecc.autotune.record import Config, Measurement, Record
from moecc.errors import InputError

ENTRY_SCHEMA = "moecc.autotune/1"
MANIFEST_SCHEMA = "moecc.autotune.environment/1"
MAX_ENTRY_BYTES = 4 << 20
WhyInvalid = Callable[[Key, Config], str | None]
"""The reason why a config is not in the space of a key, or None."""

_MEASUREMENT = {item.name for item in fields(Measurement)}
_RECORD = {item.name for item in fields(Record)}


class EntryError(ValueError):
    """The entry is of no use; the message says why, in one line."""


def signed_bytes(record: Record) -> bytes:
    """What a signature is over."""
    return canonical({"schema": ENTRY_SCHEMA, **asdict(record.unsigned())})


def dump_entry(record: Record) -> bytes:
    """The file of a record: the whole, and its best config beside it for whoever wants no more."""
    best = record.best
    return canonical(
        {
            "schema": ENTRY_SCHEMA,
            "config": best.config,
            "median_us": best.median_us,
            "spread_us": best.spread_us,
            **asdict(record),
        }
    )


def load_entry(data: bytes, *, environment: str, key_hash: str) -> Record:
    """The record of a file that was found under those hashes. Raises EntryError for everything else."""
    value = _parsed(data)
    if not isinstance(value, dict) or value.pop("schema", None) != ENTRY_SCHEMA:
        raise EntryError(f"its schema is not {ENTRY_SCHEMA}")
    best = {name: value.pop(name, None) for name in ("config", "median_us", "spread_us")}
    if set(value) != _RECORD or not isinstance(value["measured"], list):
        raise EntryError("its fields are not those of a record")
    record = _record_of(value)
    if record.environment != environment:
        raise EntryError("it belongs to another environment")
    if record.key.hash != key_hash:
        raise EntryError("it belongs to another key")
    if best != {name: getattr(record.best, name) for name in best}:
        raise EntryError("its config is not the fastest that it measured")
    return record


def dump_manifest(environment: Environment) -> bytes:
    return canonical({"schema": MANIFEST_SCHEMA, "environment": asdict(environment)})


def load_manifest(data: bytes, environment_hash: str) -> Environment:
    """The environment of a folder of that hash. Raises EntryError for everything else."""
    value = _parsed(data)
    if not isinstance(value, dict) or value.get("schema") != MANIFEST_SCHEMA:
        raise EntryError(f"its schema is not {MANIFEST_SCHEMA}")
    try:
        environment = environment_of(value.get("environment"))
    except ValueError as error:
        raise EntryError(str(error)) from None
    if environment.hash != environment_hash:
        raise EntryError("it describes another environment")
    return environment


def within_space(record: Record, why_invalid: WhyInvalid) -> tuple[Record | None, int]:
    """(the record with those configs only that the predicate accepts, None if none was timed; how many are gone)."""
    kept = tuple(item for item in record.measured if _is_valid(record.key, item.config, why_invalid))
    refused = len(record.measured) - len(kept)
    if not refused:
        return record, 0
    if not kept or kept[0].outcome != "timed":
        return None, refused
    body = {name: getattr(record, name) for name in _RECORD - {"measured", "signature", "signer"}}
    return Record(**body, measured=kept), refused


def _is_valid(key: Key, config: Config, why_invalid: WhyInvalid) -> bool:
    """A predicate may trip over a config from elsewhere in any way, which is an answer too."""
    try:
        return why_invalid(key, config) is None
    except Exception:
        return False


def _parsed(data: bytes) -> Any:
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryError(f"it has more than {MAX_ENTRY_BYTES} bytes")
    try:
        return parse(data)
    except ValueError as error:
        raise EntryError(f"it is no JSON ({str(error)[:80]})") from None


def _record_of(value: dict[str, Any]) -> Record:
    try:
        measured = [_measurement_of(item) for item in value["measured"]]
        environment, signature, signer = (value[name] for name in ("environment", "signature", "signer"))
        if not isinstance(environment, str) or not is_digest(environment):
            raise ValueError("its environment is no hash")
        if not all(isinstance(text, str) and len(text) <= 256 for text in (signature, signer)):
            raise ValueError("its signature is none")
        return Record(**{**value, "key": key_of(value["key"]), "measured": tuple(measured)})
    except (InputError, ValueError, TypeError) as error:
        raise EntryError(" ".join(str(error).split())[:160]) from None


def _measurement_of(value: Any) -> Measurement:
    if not isinstance(value, dict) or set(value) != _MEASUREMENT:
        raise ValueError("a measurement has other fields")
    return Measurement(**value)
