"""An HTTP server: GET and PUT of `URI/v1/...`. A static server will do to read, a checkout that is served too.

Writes are conditional (If-Match with the server's ETag, If-None-Match); a server that ignores the condition loses
the slower of two writes at once, which a later `push` of its writer adds again. No entry can be listed: `INDEX`, which
`moecc cache export --format folder` writes, names them for `pull`.
User and password of the URI are sent as Basic authorisation.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from moecc.autotune.remotes.store import READ_LIMIT, Blob, StoreError

INDEX = "index.json"
_MAX_INDEX_BYTES = 64 << 20
_NOT_THERE = (404, 410)
_CHANGED = (409, 412)


class HttpServer:
    """One folder of a server, over connections of a request each."""

    def __init__(self, uri: str, timeout_s: float) -> None:
        parts = urlsplit(uri)
        self._base = urlunsplit(
            (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
        )
        self._query = f"?{parts.query}" if parts.query else ""
        self._timeout_s = timeout_s
        self._headers = {"User-Agent": "moecc"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"

    def read(self, name: str) -> Blob | None:
        return self._get(name, READ_LIMIT)

    def write(self, name: str, data: bytes, replaces: str | None) -> bool:
        headers = {"Content-Type": "application/json"}
        if replaces is None:
            headers["If-None-Match"] = "*"
        elif replaces:
            headers["If-Match"] = replaces
        return self._send("PUT", name, data, headers, refusals=_CHANGED) is not None

    def names(self, prefix: str) -> Iterator[str]:
        index = self._get(INDEX, _MAX_INDEX_BYTES)
        where = f"{self._base}/{INDEX}"
        if index is None:
            raise StoreError(
                "there is no index", where=where, hint="moecc cache export --format folder writes one"
            )
        try:
            names = json.loads(index.data)["names"]
            return iter([name for name in names if isinstance(name, str) and name.startswith(prefix)])
        except (ValueError, LookupError, TypeError):
            raise StoreError("is no index", where=where, hint="write it again") from None

    def remove(self, name: str) -> None:
        self._send("DELETE", name, None, {}, refusals=_NOT_THERE)

    def _get(self, name: str, limit: int) -> Blob | None:
        return self._send("GET", name, None, {}, refusals=_NOT_THERE, limit=limit)

    def _send(
        self,
        method: str,
        name: str,
        data: bytes | None,
        headers: dict[str, str],
        *,
        refusals: tuple[int, ...],
        limit: int = 1 << 16,
    ) -> Blob | None:
        """The answer, None for one of the refusals."""
        url = f"{self._base}/{quote(name)}"
        request = urllib.request.Request(
            url + self._query, data=data, method=method, headers=self._headers | headers
        )
        try:
            return self._answer(request, limit)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in refusals:
                return None
            raise StoreError(f"{method} was answered {error.code} {error.reason}", where=url) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(f"{method} failed: {reason or type(error).__name__}", where=url) from None

    def _answer(self, request: urllib.request.Request, limit: int) -> Blob:
        """Asks once more where a busy server drops the connection; no request does harm twice."""
        try:
            return self._answer_once(request, limit)
        except (ConnectionError, urllib.error.URLError) as error:
            if not isinstance(getattr(error, "reason", error), ConnectionError):
                raise
        return self._answer_once(request, limit)

    def _answer_once(self, request: urllib.request.Request, limit: int) -> Blob:
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            return Blob(data=answer.read(limit), version=answer.headers.get("ETag") or "")


def open_store(uri: str, timeout_s: float) -> HttpServer:
    return HttpServer(uri, timeout_s)
