"""A folder, on a disk or on NFS: the local cache itself, `file:///PATH`, or a git checkout.

A file is written to a temporary name, then put in place under a lock on `.lock` of its folder, after a look whether
it still is the version to be replaced. The lock is the kernel's (flock, which NFS forwards), so that it ends with the
process that holds it: one killed at any moment leaves a temporary file at most, which `gc` removes.
Readers take no lock: a rename shows them the old file or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moecc.autotune.remotes.store import READ_LIMIT, Blob, StoreError
from moecc.errors import InputError, MoeccError
from moecc.files import write_atomic

LOCK = ".lock"
LOCK_WAIT_S = 10.0
_POLL_S = 0.005


class Folder:
    """Blobs as files below `root`, which is made at the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> Blob | None:
        data = self._bytes(name)
        return None if data is None else Blob(data=data, version=_version(data))

    def write(self, name: str, data: bytes, replaces: str | None) -> bool:
        path = self.root / name
        with _located(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent / LOCK):
                there = self.read(name)
                if (there.version if there else None) != replaces:
                    return False
                write_atomic(path, data)
        return True

    def names(self, prefix: str) -> Iterator[str]:
        """Also what is no entry, such as temporary files."""
        with _located(self.root):
            found = [path for path in (self.root / prefix).rglob("*") if not path.is_dir()]
        return iter(sorted(path.relative_to(self.root).as_posix() for path in found))

    def remove(self, name: str) -> None:
        path = self.root / name
        with _located(path):
            path.unlink(missing_ok=True)

    def _bytes(self, name: str) -> bytes | None:
        """What is no regular file counts as empty: a pipe would block, a device never end."""
        path = self.root / name
        with _located(path):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                return os.read(handle, READ_LIMIT) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
            finally:
                os.close(handle)


def open_store(uri: str, timeout_s: float) -> Folder:
    """`file:///PATH`. InputError for another host and for a relative path."""
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise InputError("is no path of this machine", where=uri, hint="file:///absolute/path")
    return Folder(path)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _located(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(error.strerror or str(error), where=str(path), hint="check the folder") from None
    except StoreError:
        raise
    except MoeccError as error:
        raise StoreError(error.message, where=str(path), hint=error.hint) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _lock(handle):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"locked for {LOCK_WAIT_S:g} s", where=str(path), hint="end the process that holds it"
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
