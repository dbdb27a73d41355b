"""One JSON file, `{"schema", "files": {name: content}}`, for mail, tickets and what a build leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecc.autotune.canonical import canonical, parse
from moecc.autotune.entry import dump_entry, dump_manifest
from moecc.autotune.key import Environment
from moecc.autotune.remotes.store import Blob, Source, Store
from moecc.autotune.sharing import environments, manifest_name, scan
from moecc.autotune.upkeep import copy_all
from moecc.errors import InputError
from moecc.files import write_atomic

SCHEMA = "moecc.autotune.bundle/1"
MAX_BUNDLE_BYTES = 256 << 20


def write(store: Source, path: Path) -> list[str]:
    """Notes: the entries that are left out."""
    manifests = {
        manifest_name(name): parse(dump_manifest(item))
        for name, item in environments(store).items()
        if isinstance(item, Environment)
    }
    found = list(scan(store))
    entries = {item.name: parse(dump_entry(item.record)) for item in found if item.record}
    write_atomic(path, canonical({"schema": SCHEMA, "files": manifests | entries}) + b"\n")
    return [f"{item.name}: {item.problem}" for item in found if item.record is None]


def read(path: Path, store: Store) -> list[str]:
    """Notes: the entries that are bad, each judged as if it had been found in a store."""
    return copy_all(Unpacked(_files(path)), store).refused


class Unpacked:
    """A source whose files are in memory, parsed."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files

    def read(self, name: str) -> Blob | None:
        known = name in self._files
        return Blob(data=json.dumps(self._files[name]).encode(), version="") if known else None

    def names(self, prefix: str) -> Iterator[str]:
        return iter(sorted(name for name in self._files if name.startswith(prefix)))


def _files(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
        value = parse(data) if len(data) <= MAX_BUNDLE_BYTES else None
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be read ({str(error)[:100]})", where=str(path), hint="name a bundle"
        ) from None
    files = value.get("files") if isinstance(value, dict) and value.get("schema") == SCHEMA else None
    if not isinstance(files, dict):
        raise InputError("is no bundle", where=str(path), hint="name what moecc cache export wrote")
    return files
