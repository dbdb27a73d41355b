"""What is done to whole stores: copying between them, and throwing away what is old, broken or too much."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from moecc.autotune.key import Environment
from moecc.autotune.remotes.folder import LOCK, Folder
from moecc.autotune.remotes.store import Source, Store
from moecc.autotune.sharing import (
    LAYOUT,
    Found,
    add_manifest,
    add_record,
    environments,
    is_known_name,
    manifest_name,
    read_record,
    scan,
)
from moecc.autotune.signing import Signer

STALE_S = 3600.0
"""Age of a temporary file that nobody is writing any more."""


@dataclass(kw_only=True)
class Copied:
    """Entries by what became of them, and why those in `refused` were not taken."""

    written: int = 0
    unchanged: int = 0
    refused: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Removed:
    """Names of what was removed, by reason, and their bytes."""

    broken: list[str] = field(default_factory=list)
    old: list[str] = field(default_factory=list)
    too_much: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    bytes: int = 0


def copy_all(
    source: Source,
    target: Store,
    *,
    signer: Signer | None = None,
    trusted_source: Collection[str] | None = None,
    trusted_target: Collection[str] | None = None,
    keep_signed: bool = False,
) -> Copied:
    """Merges every good entry of the source into the target, signing what is new there.

    trusted_source: public keys of which one must have signed an entry to be taken. trusted_target: the same for
    what is merged with; the rest is replaced. keep_signed: see add_record. StoreError where a store does not answer.
    """
    copied = Copied()
    described = _copy_manifests(source, target)
    accepted = partial(read_record, trusted=trusted_target)
    for found in scan(source, trusted_source):
        if found.record is None or found.environment not in described:
            copied.refused.append(f"{found.name}: {found.problem or 'its environment has no manifest'}")
            continue
        _, wrote = add_record(target, found.record, signer=signer, accepted=accepted, keep_signed=keep_signed)
        copied.written += wrote
        copied.unchanged += not wrote
    return copied


def clean(
    folder: Folder,
    *,
    older_than_days: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> Removed:
    """Removes broken entries and stale temporary files, entries last measured long ago, and the oldest above a size.

    Files that this cache did not write are left alone. StoreError where the folder refuses.
    """
    removed = Removed()
    found = list(scan(folder))
    kept = sorted((item for item in found if item.record), key=_date)
    removed.broken = [item.name for item in found if item.record is None]
    if older_than_days is not None:
        oldest = datetime.fromtimestamp(time.time() - older_than_days * 86400, timezone.utc).isoformat()
        removed.old = [item.name for item in kept if _date(item) < oldest]
        kept = kept[len(removed.old) :]
    total = sum(item.bytes for item in kept)
    while max_bytes is not None and total > max_bytes:
        total -= kept[0].bytes
        removed.too_much.append(kept.pop(0).name)
    removed.stale = _stale(folder)
    names = {*removed.broken, *removed.old, *removed.too_much}
    removed.bytes = sum(item.bytes for item in found if item.name in names)
    for name in () if dry_run else (*names, *removed.stale):
        folder.remove(name)
    return removed


def check(folder: Folder, trusted: Collection[str] | None = None) -> tuple[int, dict[str, str]]:
    """(number of good entries, what is wrong with each other file by name), environments without manifest included."""
    found = list(scan(folder, trusted))
    known = environments(folder)
    problems = {item.name: item.problem for item in found if item.record is None}
    for item in found:
        if item.environment not in known:
            problems[manifest_name(item.environment)] = "is missing"
    for environment, described in known.items():
        if isinstance(described, str):
            problems[manifest_name(environment)] = described
    for name in folder.names(f"{LAYOUT}/"):
        if not is_known_name(name) and Path(name).name != LOCK and not _is_temporary(name):
            problems[name] = "is no file of this cache"
    return sum(item.record is not None for item in found), problems


def _copy_manifests(source: Source, target: Store) -> set[str]:
    known = {name: item for name, item in environments(source).items() if isinstance(item, Environment)}
    for environment in known.values():
        add_manifest(target, environment)
    return set(known)


def _date(item: Found) -> str:
    return item.record.date if item.record else ""


def _stale(folder: Folder) -> list[str]:
    limit = time.time() - STALE_S
    return [
        name
        for name in folder.names(f"{LAYOUT}/")
        if _is_temporary(name) and (folder.root / name).lstat().st_mtime < limit
    ]


def _is_temporary(name: str) -> bool:
    last = Path(name).name
    return last.startswith(".") and last.endswith(".tmp")
