"""What was tuned before: by this process, on this machine, by others. Nothing that goes wrong here stops the caller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from moecc.autotune.cache_settings import CacheSettings, read_settings
from moecc.autotune.entry import EntryError, WhyInvalid, within_space
from moecc.autotune.key import Environment, Key
from moecc.autotune.record import Record, merge
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.remotes.patience import PatientRemote
from moecc.autotune.remotes.store import Store, StoreError
from moecc.autotune.sharing import add_manifest, add_record, entry_name, read_record
from moecc.errors import InputError

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(kw_only=True)
class Counts:
    """Look-ups by where they ended, and entries that were found and refused."""

    process: int = 0
    local: int = 0
    remote: int = 0
    misses: int = 0
    bad: int = 0


class Cache:
    """The records of one environment: in the process, then in the local folder, then in the remote.

    `why_invalid` is the predicate of the space: configs that it refuses are left out of what `get` returns. Warnings
    go to this module's logger, one line each. InputError for settings that contradict each other, MoeccError where a
    package that they need is missing; after that nothing is raised for what folder, remote or entries do.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        why_invalid: WhyInvalid = lambda key, config: None,
        settings: CacheSettings | None = None,
    ) -> None:
        settings = settings or read_settings()
        self.environment = environment
        self.counts = Counts()
        self._why_invalid = why_invalid
        self._trusted = settings.trusted or None
        self._signer = settings.open_signer()
        self._known: dict[Key, Record] = {}
        self._warned = False
        self._manifests: set[int] = set()
        self._local = Folder(settings.folder) if settings.folder else None
        if self._local is None:
            self._warn_local("there is no home folder; set MOECC_CACHE")
        remote = settings.open_remote()
        self.remote = PatientRemote(remote) if remote else None

    def get(self, key: Key) -> Record | None:
        """What is known of that key, with configs of the space only; None for nothing."""
        if key in self._known:
            self.counts.process += 1
            return self._known[key]
        if record := self._get_local(key):
            self.counts.local += 1
        elif record := self._get_remote(key):
            self.counts.remote += 1
        else:
            self.counts.misses += 1
            return None
        self._known[key] = record
        return record

    def put(self, record: Record) -> Record:
        """Keeps a record beside all that is known of its key, locally and, where it may be written, remotely.

        Returns the union of this process and the local folder. InputError for a record of another environment.
        """
        if record.environment != self.environment.hash:
            raise InputError("it was measured in another environment", where=f"record {record.key.hash}")
        if known := self._known.get(record.key):
            record = merge(known, record)
        kept = self._put_local(record) or record
        self._known[record.key] = self._within_space(kept, "local cache") or record
        if self.remote:
            self.remote.tell(partial(self._add_remotely, record))
        return self._known[record.key]

    def _get_local(self, key: Key) -> Record | None:
        local = self._local
        name = entry_name(self.environment.hash, key.hash)
        blob = self._locally(lambda: local.read(name)) if local else None
        return self._usable(name, blob.data, f"{local.root}/{name}", trusted=None) if local and blob else None

    def _get_remote(self, key: Key) -> Record | None:
        if self.remote is None:
            return None
        name = entry_name(self.environment.hash, key.hash)
        blob = self.remote.ask(lambda store: store.read(name))
        if blob is None:
            return None
        where = f"{self.remote.remote.name}/{name}"
        record = self._usable(name, blob.data, where, trusted=self._trusted)
        if record is not None:
            self._put_local(record)
        return record

    def _usable(self, name: str, data: bytes, where: str, *, trusted: frozenset[str] | None) -> Record | None:
        try:
            record = read_record(name, data, trusted)
        except EntryError as error:
            self.counts.bad += 1
            log.warning("%s: ignored: %s", where, error)
            return None
        return self._within_space(record, where)

    def _within_space(self, record: Record, where: str) -> Record | None:
        usable, refused = within_space(record, self._why_invalid)
        if refused:
            log.warning("%s: %d of %d configs are not in the space", where, refused, len(record.measured))
            self.counts.bad += usable is None
        return usable

    def _put_local(self, record: Record) -> Record | None:
        local = self._local
        if local is None:
            return None
        accepted = partial(read_record, trusted=None)
        self._locally(lambda: self._add_manifest(local))
        added = self._locally(lambda: add_record(local, record, accepted=accepted))
        return added[0] if added else None

    def _add_remotely(self, record: Record, store: Store) -> bool:
        """Merges with nothing that this process would not sign, or not read."""
        trusted = self._trusted
        if self._signer is not None:
            trusted = (trusted or frozenset()) | {self._signer.public}
        self._add_manifest(store)
        accepted = partial(read_record, trusted=trusted)
        return add_record(store, record, signer=self._signer, accepted=accepted, keep_signed=True)[1]

    def _add_manifest(self, store: Store) -> None:
        if id(store) not in self._manifests:
            add_manifest(store, self.environment)
            self._manifests.add(id(store))

    def _locally(self, work: Callable[[], _Result]) -> _Result | None:
        try:
            return work()
        except StoreError as error:
            self._warn_local(str(error))
            return None

    def _warn_local(self, problem: str) -> None:
        """Once: a full disk stays full."""
        if not self._warned:
            log.warning(
                "the local cache does not work: %s; what is tuned is kept by this process only", problem
            )
        self._warned = True
