"""Object stores, by fsspec: `s3://BUCKET/FOLDER` through s3fs, `gs://BUCKET/FOLDER` through gcsfs.

Credentials and endpoints come from where those packages look (AWS_ENDPOINT_URL, AWS_PROFILE, gcloud's login).
S3 compares: a new object is created exclusively and an old one replaced If-Match. On gs:// only creating is exclusive:
of two that replace one entry at once the slower wins, and a later `push` of the other adds its part again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from moecc.autotune.remotes.store import READ_LIMIT, Blob, StoreError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CHANGED = ("PreconditionFailed", "At least one of the pre-conditions", "ConditionalRequestConflict")
_Result = TypeVar("_Result")


class Objects:
    """Objects below a folder of a bucket. `options` are those of the file system of `scheme`."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        parts = urlsplit(uri)
        self._scheme, self._options = parts.scheme, options
        self._root = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        self._where = f"{parts.scheme}://{self._root}"
        self._opened: Any = None

    def read(self, name: str) -> Blob | None:
        def get() -> Blob:
            path = self._path(name)
            version = str(self._files.info(path, refresh=True).get("ETag", ""))
            return Blob(data=self._files.cat_file(path, start=0, end=READ_LIMIT), version=version)

        try:
            return self._ask(get)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, replaces: str | None) -> bool:
        match = {"IfMatch": replaces} if replaces and self._scheme == "s3" else {}
        mode = "create" if replaces is None else "overwrite"
        try:
            self._ask(lambda: self._files.pipe_file(self._path(name), data, mode=mode, **match))
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix.rstrip("/"))
        try:
            found = self._ask(lambda: self._files.find(folder, refresh=True))
        except FileNotFoundError:
            found = []
        return iter(sorted(path.removeprefix(f"{self._root}/") for path in found))

    def remove(self, name: str) -> None:
        try:
            self._ask(lambda: self._files.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    @property
    def _files(self) -> Any:
        """Opened at the first question, which may ask a server for credentials."""
        if self._opened is None:
            self._opened = fsspec.filesystem(self._scheme, skip_instance_cache=True, **self._options)
        return self._opened

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        """FileNotFoundError and FileExistsError pass; these packages raise whatever their clients do."""
        try:
            return question()
        except FileNotFoundError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, FileExistsError) or any(word in text for word in _CHANGED):
                raise FileExistsError from None
            raise StoreError(text[:160], where=self._where) from None


def open_store(uri: str, timeout_s: float) -> Objects:
    """A file system that connects at its first question. ModuleNotFoundError where its package is missing."""
    scheme = urlsplit(uri).scheme
    import_module(PACKAGES[scheme])
    if scheme == "gs":
        return Objects(uri, {"timeout": timeout_s})
    once_more = {"max_attempts": 1}  # S3 answers 500 and 503 now and then, and asks to be asked again
    limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": once_more}
    return Objects(uri, {"config_kwargs": limits, "use_listings_cache": False})
