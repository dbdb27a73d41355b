"""Entries in stores: their names, reading one without trust, adding a record to what is there."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from moecc.autotune.entry import (
    MAX_ENTRY_BYTES,
    EntryError,
    dump_entry,
    dump_manifest,
    load_entry,
    load_manifest,
)
from moecc.autotune.key import Environment
from moecc.autotune.record import Record, merge
from moecc.autotune.remotes.store import Blob, Source, Store, StoreError
from moecc.autotune.signing import Signer, why_untrusted

LAYOUT = "v1"
_ENTRY = re.compile(rf"{LAYOUT}/([0-9a-f]{{32}})/entries/([0-9a-f]{{32}})\.json")
_MANIFEST = re.compile(rf"{LAYOUT}/([0-9a-f]{{32}})/manifest\.json")
_ATTEMPTS = 200
_PAUSE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Found:
    """One entry of a store: its record, or the problem with it."""

    name: str
    environment: str
    bytes: int
    record: Record | None
    problem: str


def entry_name(environment_hash: str, key_hash: str) -> str:
    return f"{LAYOUT}/{environment_hash}/entries/{key_hash}.json"


def manifest_name(environment_hash: str) -> str:
    return f"{LAYOUT}/{environment_hash}/manifest.json"


def is_known_name(name: str) -> bool:
    """Whether it is that of an entry or of a manifest."""
    return bool(_ENTRY.fullmatch(name) or _MANIFEST.fullmatch(name))


def read_record(name: str, data: bytes, trusted: Collection[str] | None) -> Record:
    """The record of an entry. EntryError for one that is bad, or not signed by one of `trusted` (None: no matter)."""
    found = _ENTRY.fullmatch(name)
    if found is None:
        raise EntryError("its name is not that of an entry")
    record = load_entry(data, environment=found[1], key_hash=found[2])
    if trusted is not None and (problem := why_untrusted(record, trusted)):
        raise EntryError(problem)
    return record


def scan(store: Source, trusted: Collection[str] | None = None) -> Iterator[Found]:
    """Every entry of a store, in the order of names; other names are left out. StoreError from the store."""
    for name in store.names(f"{LAYOUT}/"):
        if found := _ENTRY.fullmatch(name):
            blob = store.read(name)
            if blob is not None:
                yield _judged(name, found[1], blob.data, trusted)


def environments(store: Source) -> dict[str, Environment | str]:
    """By hash, the environment of each manifest or what is wrong with it."""
    found: dict[str, Environment | str] = {}
    for name in store.names(f"{LAYOUT}/"):
        match = _MANIFEST.fullmatch(name)
        blob = store.read(name) if match else None
        if match and blob is not None:
            try:
                found[match[1]] = load_manifest(blob.data, match[1])
            except EntryError as error:
                found[match[1]] = str(error)
    return found


def add_manifest(store: Store, environment: Environment) -> bool:
    """Says what an environment's hash stands for, unless the store knows; whether something was written."""
    name = manifest_name(environment.hash)
    there = store.read(name)
    if there is not None:
        try:
            load_manifest(there.data, environment.hash)
            return False
        except EntryError:
            pass
    return store.write(name, dump_manifest(environment), there.version if there else None)


def add_record(
    store: Store,
    record: Record,
    *,
    signer: Signer | None = None,
    accepted: Callable[[str, bytes], Record],
    keep_signed: bool = False,
) -> tuple[Record, bool]:
    """Merges a record into the store's; (what is there then, whether something was written).

    What is there is read, merged and written back as long as somebody else was faster. `accepted` reads it; what it
    refuses with EntryError is replaced. `keep_signed`: no unsigned record takes the place of a signed one.
    Raises StoreError.
    """
    name = entry_name(record.environment, record.key.hash)
    for _ in range(_ATTEMPTS):
        blob = store.read(name)
        there = _accepted_or_none(name, blob, accepted)
        joined = record if there is None else _joined(there, record)
        if joined is there:
            return joined, False
        if signer is not None and not joined.signature:
            joined = signer.sign(joined)
        if keep_signed and there is not None and there.signature and not joined.signature:
            raise StoreError(
                "is signed, and an unsigned record does not replace it", where=name, hint="sign yours"
            )
        data = dump_entry(joined)
        if len(data) > MAX_ENTRY_BYTES:
            raise StoreError(f"{len(data)} bytes are more than {MAX_ENTRY_BYTES}", where=name)
        if store.write(name, data, blob.version if blob else None):
            return joined, True
        time.sleep(random.uniform(0, _PAUSE_S))
    raise StoreError(f"others wrote it {_ATTEMPTS} times meanwhile", where=name, hint="push it later")


def _joined(there: Record, new: Record) -> Record:
    """Either of them, with its signature, where it holds all that the other does."""
    both = merge(there, new)
    for one in (there, new):
        if both == one.unsigned():
            return one
    return both


def _accepted_or_none(
    name: str, blob: Blob | None, accepted: Callable[[str, bytes], Record]
) -> Record | None:
    try:
        return accepted(name, blob.data) if blob else None
    except EntryError:
        return None


def _judged(name: str, environment: str, data: bytes, trusted: Collection[str] | None) -> Found:
    record, problem = None, ""
    try:
        record = read_record(name, data, trusted)
    except EntryError as error:
        problem = str(error)
    return Found(name=name, environment=environment, bytes=len(data), record=record, problem=problem)
