"""Helpers of this folder, and a user without caches of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from servers import http_server, redis_server, s3_bucket

from moecc.autotune.remotes import open_remote


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_REMOTE", "_TRUSTED", "_SIGNING_KEY"):
        monkeypatch.delenv(f"MOECC_CACHE{name}", raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="session")
def _redis() -> Iterator[str]:
    with redis_server() as uri:
        yield uri


@pytest.fixture(scope="session")
def _s3() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture
def redis_uri(_redis: str) -> str:
    """An empty one."""
    return _emptied(_redis)


@pytest.fixture
def s3_uri(_s3: str) -> str:
    """An empty one."""
    return _emptied(_s3)


def _emptied(uri: str) -> str:
    store = open_remote(uri).store
    for name in store.names(""):
        store.remove(name)
    return uri


@pytest.fixture
def http_uri(tmp_path: Path) -> Iterator[str]:
    with http_server(tmp_path / "served") as uri:
        yield uri
