"""Where entries are kept: a store by the scheme of its URI. One more store is one file and one line in `STORES`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from moecc.autotune.remotes.store import Store
from moecc.errors import InputError, MoeccError

STORES = {
    "file": "folder",
    "http": "http",
    "https": "http",
    "redis": "redis_server",
    "rediss": "redis_server",
    "s3": "objects",
    "gs": "objects",
}
"""Scheme of the URI: module beside this one, whose `open_store(uri, timeout_s)` it calls."""

EXTRAS = {"redis": "redis", "rediss": "redis", "s3": "s3", "gs": "gs"}
"""Scheme: the optional dependencies of moecc that its store needs."""

DEFAULT_TIMEOUT_S = 3.0
_TRUTH = {"1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A store that others share. `name` is the URI without password and settings, for messages."""

    name: str
    store: Store
    writable: bool
    timeout_s: float


def open_remote(uri: str) -> Remote:
    """The store of a URI. Its query may say `write=1` (read-only otherwise) and `timeout_s=SECONDS`; the rest is the
    store's own. Nothing is sent yet. InputError for a URI that is none, MoeccError where a package is missing.
    """
    parts = urlsplit(uri)
    module = STORES.get(parts.scheme)
    if module is None:
        known = ", ".join(f"{scheme}://" for scheme in STORES)
        raise InputError(f"{parts.scheme or 'no'} scheme is not known", where=_safe(uri), hint=known)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    write, timeout = query.pop("write", "0"), query.pop("timeout_s", str(DEFAULT_TIMEOUT_S))
    if write not in _TRUTH:
        raise InputError(f"write={write} is neither 0 nor 1", where=_safe(uri), hint="write=1 allows writing")
    rest = "&".join(f"{name}={value}" for name, value in query.items())
    plain = urlunsplit(parts._replace(query=rest, fragment=""))
    timeout_s = _seconds(timeout, uri)
    try:
        store: Store = importlib.import_module(f"{__name__}.{module}").open_store(plain, timeout_s)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(parts.scheme, "")
        raise MoeccError(
            f"needs the package {error.name}", where=_safe(uri), hint=f"pip install 'moecc[{extra}]'"
        ) from None
    return Remote(name=_safe(uri), store=store, writable=_TRUTH[write], timeout_s=timeout_s)


def _seconds(text: str, uri: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise InputError(f"timeout_s={text} is not in (0, 600]", where=_safe(uri), hint="seconds")
    return value


def _safe(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
