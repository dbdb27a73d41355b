"""Many writers at once, writers that are killed, disks and homes that are not there, a fleet."""

from __future__ import annotations

import errno
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cache_samples import ENVIRONMENT, cache, entries, key, measured, record

from moecc.autotune.cache import Cache
from moecc.autotune.cache_settings import read_settings
from moecc.autotune.record import Record
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.upkeep import check

HERE = Path(__file__).parent
WRITERS = 16


def worker(folder: Path, *arguments: object, remote: str = "", **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "cache_worker.py"), str(folder), remote, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def lines(process: subprocess.Popen[str]) -> list[str]:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    return output.split()


def assert_nothing_is_lost(folder: Path, shared_keys: int) -> None:
    good, problems = check(Folder(folder))
    assert not problems
    assert good == shared_keys
    for tokens in range(1, 1 + shared_keys):
        found = cache(folder).get(key(tokens))
        assert found is not None
        assert sorted(item.median_us for item in found.measured) == [101.0 + i for i in range(WRITERS)]
    assert not list(folder.rglob("*.tmp"))


def test_sixteen_processes_that_write_the_same_entries_at_once(tmp_path: Path) -> None:
    go, folder = tmp_path / "go", tmp_path / "cache"
    writers = [worker(folder, seed, 1, 9, go) for seed in range(1, 1 + WRITERS)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    go.touch()
    for writer in writers:
        lines(writer)
    assert_nothing_is_lost(folder, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "http", "redis", "s3"])
def test_sixteen_processes_that_share_a_remote(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = f"file://{tmp_path}/shared" if kind == "file" else request.getfixturevalue(f"{kind}_uri")
    remote = f"{uri}{'&' if '?' in uri else '?'}write=1&timeout_s=60"
    go = tmp_path / "go"
    writers = [worker(tmp_path / f"w{i}", i, 1, 5, go, remote=remote) for i in range(1, 1 + WRITERS)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    go.touch()
    for writer in writers:
        lines(writer)
    fresh = cache(tmp_path / "fresh", remote)
    for tokens in range(1, 5):
        fresh.get(key(tokens))
    assert_nothing_is_lost(tmp_path / "fresh", 4)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/shared?write=1"
    first = lines(worker(tmp_path / "one", 1, 1, 6, remote=remote))
    second = lines(worker(tmp_path / "two", 2, 1, 9, remote=remote))
    assert first == ["ready", "1", "2", "3", "4", "5"]
    assert second == ["ready", "6", "7", "8"]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_tuner_breaks_nothing_and_goes_on(kills: int, tmp_path: Path) -> None:
    rng = random.Random(kills)
    keys, begun = 400, 0
    for _ in range(kills):
        process = worker(tmp_path, 16, 1, keys)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        begun += len(process.communicate()[0].split())
        _, problems = check(Folder(tmp_path))
        assert not problems
    begun += len(lines(worker(tmp_path, 16, 1, keys))) - 1
    assert check(Folder(tmp_path)) == (keys - 1, {})
    assert keys - 1 <= begun <= keys - 1 + kills


def survives(folder: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    """Keeps for this process what it cannot store, and says so once."""
    one = cache(folder)
    for tokens in range(1, 4):
        assert one.get(key(tokens)) is None
        one.put(record(tokens))
    for tokens in range(1, 4):
        assert one.get(key(tokens)) == record(tokens)
    assert one.counts.process == 3
    assert len(caplog.records) == 1
    assert "the local cache does not work" in caplog.records[0].getMessage()


def test_no_home_is_survived(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert read_settings({}).folder is None
    survives(read_settings({}).folder, caplog)


def test_a_home_that_is_not_there_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "home").write_text("a file")
    survives(tmp_path / "home" / ".cache" / "moecc", caplog)


def test_a_full_disk_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    cache(tmp_path).put(record(99))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        survives(tmp_path, caplog)
    assert check(Folder(tmp_path)) == (1, {})
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_disk_that_takes_no_byte_is_survived(tmp_path: Path) -> None:
    def take_nothing() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    process = worker(tmp_path, 1, 1, 4, preexec_fn=take_nothing, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.split() == ["ready", "1", "2", "3"]
    assert errors.count("\n") == 1
    assert "the local cache does not work" in errors
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MOECC_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/moecc")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "moecc"),
        ({}, Path.home() / ".cache" / "moecc"),
    ],
)
def test_where_the_local_folder_is(variables: dict[str, str], folder: Path) -> None:
    assert read_settings(variables).folder == folder


def fleet(folder: Path, remote: str, *, machines: int = 20, shapes: int = 40, at_once: bool = False) -> int:
    """Measurements in all, where every machine tunes every shape in an order of its own, one in each step.

    In a step machines follow each other, or all look before any of them has measured.
    """
    rng = random.Random(6)
    caches = [cache(folder / str(i), remote) for i in range(machines)]
    plans = [rng.sample(range(1, 1 + shapes), shapes) for _ in caches]
    measurements = 0
    for step in range(shapes):
        waiting = []
        for one, plan in zip(caches, plans, strict=True):
            if one.get(key(plan[step])) is None:
                measurements += 1
                waiting.append((one, record(plan[step], measured(16, rng.uniform(10, 11)))))
            if not at_once:
                _put(waiting)
        _put(waiting)
    return measurements


def _put(waiting: list[tuple[Cache, Record]]) -> None:
    while waiting:
        one, new = waiting.pop()
        one.put(new)


@pytest.mark.parametrize(
    "kind", ["file", "redis", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("http", "s3"))]
)
def test_a_fleet_measures_once_what_it_shares(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = f"file://{tmp_path}/shared" if kind == "file" else request.getfixturevalue(f"{kind}_uri")
    remote = f"{uri}{'&' if '?' in uri else '?'}write=1&timeout_s=60"
    assert fleet(tmp_path / "fleet", remote) == 40
    assert fleet(tmp_path / "later", uri) == 0


def test_machines_that_do_not_share_measure_everything(tmp_path: Path) -> None:
    assert fleet(tmp_path, "") == 20 * 40


def test_machines_that_start_a_shape_at_once_all_measure_it(tmp_path: Path) -> None:
    shared = fleet(tmp_path / "fleet", f"file://{tmp_path}/shared?write=1", at_once=True)
    assert 40 < shared <= 100


def test_the_environment_has_a_manifest(tmp_path: Path) -> None:
    cache(tmp_path).put(record())
    assert (tmp_path / "v1" / ENVIRONMENT.hash / "manifest.json").is_file()
