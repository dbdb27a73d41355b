"""Helpers of this folder, and a user without caches of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from servers import http_server, redis_server, s3_bucket


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_REMOTE", "_TRUSTED", "_SIGNING_KEY"):
        monkeypatch.delenv(f"MOECC_CACHE{name}", raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="session")
def redis_uri() -> Iterator[str]:
    with redis_server() as uri:
        yield uri


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture
def http_uri(tmp_path: Path) -> Iterator[str]:
    with http_server(tmp_path / "served") as uri:
        yield uri
