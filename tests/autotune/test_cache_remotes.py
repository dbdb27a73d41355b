"""Every kind of store on a real server: what one cache learns, the next one knows."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from cache_samples import ENVIRONMENT, cache, entries, key, measured, record
from servers import http_server

from moecc.autotune.remotes import Remote, open_remote
from moecc.autotune.remotes.http import HttpServer
from moecc.autotune.remotes.patience import PatientRemote
from moecc.autotune.remotes.store import READ_LIMIT, Store
from moecc.autotune.sharing import entry_name
from moecc.errors import InputError, MoeccError

NAME = entry_name(ENVIRONMENT.hash, key(16).hash)


@pytest.fixture(params=["file", "http", "redis", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    return str(request.getfixturevalue(f"{request.param}_uri"))


def writable(uri: str) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}write=1"


def patient(store: Store, timeout_s: float = 60.0) -> PatientRemote:
    return PatientRemote(Remote(name="remote", store=store, writable=True, timeout_s=timeout_s))


def test_a_store_replaces_only_the_version_that_is_named(uri: str) -> None:
    store = open_remote(uri).store
    assert store.read(NAME) is None
    assert store.write(NAME, b"one", None)
    assert not store.write(NAME, b"two", None)
    first = store.read(NAME)
    assert first is not None
    assert first.data == b"one"
    assert store.write(NAME, b"three", first.version)
    assert not store.write(NAME, b"four", first.version)
    last = store.read(NAME)
    assert last is not None
    assert last.data == b"three"


def test_a_store_reads_no_more_than_an_entry_may_have(uri: str) -> None:
    store = open_remote(uri).store
    assert store.write(NAME, b"x" * (READ_LIMIT + 5), None)
    blob = store.read(NAME)
    assert blob is not None
    assert len(blob.data) == READ_LIMIT


def test_what_one_machine_tunes_another_finds(uri: str, tmp_path: Path) -> None:
    cache(tmp_path / "one", writable(uri)).put(record())
    other = cache(tmp_path / "other", uri)
    assert other.get(key(16)) == record()
    assert other.get(key(32)) is None
    assert (other.counts.remote, other.counts.misses) == (1, 1)
    third = cache(tmp_path / "other")
    assert third.get(key(16)) == record()
    assert third.counts.local == 1


def test_a_larger_search_extends_the_one_that_is_there(uri: str, tmp_path: Path) -> None:
    cache(tmp_path / "one", writable(uri)).put(record(16, measured(16, 10.0)))
    cache(tmp_path / "two", writable(uri)).put(record(16, measured(32, 9.0), measured(64, 30.0)))
    found = cache(tmp_path / "three", uri).get(key(16))
    assert found is not None
    assert [item.median_us for item in found.measured] == [9.0, 10.0, 30.0]


def test_remotes_are_read_only_unless_the_uri_says_otherwise(uri: str, tmp_path: Path) -> None:
    one = cache(tmp_path / "one", uri)
    one.put(record())
    assert entries(tmp_path / "one")
    assert open_remote(uri).store.read(NAME) is None
    assert one.remote is not None
    assert one.remote.asked == 0


def test_a_server_that_refuses_to_write_is_still_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = tmp_path / "served"
    cache(tmp_path / "one", f"file://{served}?write=1").put(record())
    with http_server(served, read_only=True) as uri:
        two = cache(tmp_path / "two", f"{uri}?write=1")
        two.put(record(32))
        two.put(record(64))
        assert two.get(key(16)) == record()
    assert len(caplog.records) == 1
    assert "405" in caplog.text
    assert "not written again" in caplog.text


@pytest.mark.parametrize("scheme", ["http", "redis", "s3"])
def test_a_server_that_is_down_costs_one_question(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
            monkeypatch.setenv(f"AWS_{name}", "x")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        where = "shelf/tuned" if scheme == "s3" else f"{address}/0"
        one = cache(tmp_path, f"{scheme}://{where}?timeout_s=30&write=1")
        for tokens in range(1, 6):
            assert one.get(key(tokens)) is None
            one.put(record(tokens))
    assert one.remote is not None
    assert (one.remote.asked, one.remote.failed) == (1, 1)
    assert len(caplog.records) == 1
    assert len(caplog.records[0].getMessage().splitlines()) == 1
    assert len(entries(tmp_path)) == 5


def test_a_server_that_never_answers_costs_one_timeout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        one = cache(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}?timeout_s=0.2")
        for tokens in range(1, 21):
            assert one.get(key(tokens)) is None
    assert one.remote is not None
    assert (one.remote.asked, one.remote.failed) == (1, 1)
    assert len(caplog.records) == 1


def test_slow_answers_use_the_timeout_up_together(caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        def read(self, name: str) -> None:
            time.sleep(0.3)

    remote = patient(Slow(), timeout_s=1.0)  # type: ignore[arg-type]
    for _ in range(20):
        remote.ask(lambda store: store.read("x"))
    assert 2 <= remote.asked <= 6  # 0.2 s of each are waiting
    assert len(caplog.records) == 1


def test_whatever_a_client_library_raises_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def read(self, name: str) -> None:
            raise RuntimeError("boom")

    remote = patient(Broken())  # type: ignore[arg-type]
    assert remote.ask(lambda store: store.read("x")) is None
    assert remote.given_up
    assert "boom" in caplog.text


def test_names_come_from_the_index_of_a_static_server(http_uri: str, tmp_path: Path) -> None:
    with pytest.raises(MoeccError, match=r"there is no index; hint: moecc cache export"):
        open_remote(http_uri).store.names("v1/")
    (tmp_path / "served" / "index.json").write_text('{"names": ["v1/a", "../b", 7]}')
    assert list(open_remote(http_uri).store.names("v1/")) == ["v1/a"]


def test_passwords_are_sent_and_never_shown() -> None:
    remote = open_remote("https://me:secret@host/cache?timeout_s=1")
    assert remote.name == "https://host/cache"
    assert isinstance(remote.store, HttpServer)
    assert remote.store._headers["Authorization"] == "Basic bWU6c2VjcmV0"
    with pytest.raises(InputError) as error:
        open_remote("ftp://me:secret@host/cache")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("cache", "cache: no scheme is not known; hint: file://, http://"),
        ("file:///x?write=yes", "file:///x: write=yes is neither 0 nor 1; hint: write=1 allows writing"),
        ("file:///x?timeout_s=0", "file:///x: timeout_s=0 is not in (0, 600]; hint: seconds"),
        ("file://host/x", "file://host/x: is no path of this machine; hint: file:///absolute/path"),
    ],
)
def test_wrong_uris_are_errors(uri: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        open_remote(uri)
    assert str(error.value).startswith(message)
