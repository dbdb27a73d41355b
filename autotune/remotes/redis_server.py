"""A Redis server, `redis://` or with TLS `rediss://`: one string a name, under the prefix `moecc:`.

A write is a transaction that watches its name. Whatever else the URI says (user, password, number of the database,
options of TLS) is redis-py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from moecc.autotune.remotes.store import READ_LIMIT, Blob, StoreError
from moecc.errors import InputError

PREFIX = "moecc:"
_Result = TypeVar("_Result")


class RedisServer:
    """Strings of one database."""

    def __init__(self, client: redis.Redis, where: str) -> None:
        self._client, self._where = client, where

    def read(self, name: str) -> Blob | None:
        data = self._ask(lambda: self._client.getrange(PREFIX + name, 0, READ_LIMIT - 1))
        return Blob(data=cast(bytes, data), version=_version(cast(bytes, data))) if data else None

    def write(self, name: str, data: bytes, replaces: str | None) -> bool:
        return self._ask(lambda: self._compare_and_set(PREFIX + name, data, replaces))

    def names(self, prefix: str) -> Iterator[str]:
        pattern = f"{PREFIX}{prefix}*"
        found = self._ask(lambda: list(self._client.scan_iter(match=pattern, count=1000)))
        return iter(sorted(key.decode("utf-8", "replace").removeprefix(PREFIX) for key in found))

    def remove(self, name: str) -> None:
        self._ask(lambda: self._client.delete(PREFIX + name))

    def _compare_and_set(self, name: str, data: bytes, replaces: str | None) -> bool:
        with self._client.pipeline() as pipe:
            pipe.watch(name)  # type: ignore[no-untyped-call]
            there = cast(bytes, pipe.getrange(name, 0, READ_LIMIT - 1))
            if (_version(there) if there else None) != replaces:
                return False
            pipe.multi()
            pipe.set(name, data)
            try:
                pipe.execute()
            except redis.WatchError:
                return False
        return True

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        try:
            return question()
        except (redis.RedisError, OSError) as error:
            raise StoreError(str(error), where=self._where) from None


def open_store(uri: str, timeout_s: float) -> RedisServer:
    """A client that connects at its first question. InputError for a URI that redis-py does not take."""
    where = f"redis server {uri.rpartition('@')[2].rpartition('//')[2]}"
    try:
        client = redis.Redis.from_url(
            uri, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise InputError(str(error), where=where, hint="redis://HOST:PORT/DATABASE") from None
    return RedisServer(client, where)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
