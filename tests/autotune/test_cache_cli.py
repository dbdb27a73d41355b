"""moecc cache, as a user meets it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cache_samples import ENVIRONMENT, cache, entries, key, measured, record
from servers import http_server

from moecc.autotune.remotes import open_remote
from moecc.cli import main


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, with two entries."""
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "local"))
    one = cache(tmp_path / "local")
    one.put(record(16))
    one.put(record(32, measured(16, 40.0)))
    return tmp_path / "local"


@pytest.fixture
def moecc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `moecc cache ...`; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecc", "cache", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def as_json(result: tuple[int, str, str]) -> Any:
    assert result[0] == 0, result[2]
    return json.loads(result[1])


def test_ls_show_and_stats(moecc: Any, local: Path) -> None:
    listed = as_json(moecc("ls", "--json"))
    assert {row["tokens"]: row["best_us"] for row in listed["entries"]} == {16: 10.0, 32: 40.0}
    assert listed["bad"] == {}
    assert "NVIDIA H100" in moecc("ls")[1]
    shown = as_json(moecc("show", key(16).hash[:12], "--json"))
    assert shown["record"]["key"]["hidden"] == 2048
    assert shown["environment"]["cores"] == 132
    assert "block_m" in moecc("show", key(16).hash)[1]
    (stats,) = as_json(moecc("stats", "--json"))["environments"]
    assert (stats["entries"], stats["configs"], stats["bad"]) == (2, 3, 0)
    assert stats["median_speedup"] == pytest.approx((20 / 10 + 20 / 40) / 2)
    assert "2" in moecc("stats")[1]


def test_show_wants_one_entry(moecc: Any, local: Path) -> None:
    assert moecc("show", "zz")[0] == 2
    code, _, errors = moecc("show", "")
    assert code == 2
    assert errors == "error: entry '': 2 entries begin so; hint: moecc cache ls prints them\n"


def test_texts_from_elsewhere_are_no_markup(moecc: Any, local: Path) -> None:
    one = measured(16, 1.0)
    cache(local).put(record(48, one, type(one)(config={"a": "[/bold]"}, outcome="failed", reason="[/red]")))
    assert "[/red]" in moecc("show", key(48).hash)[1]


def test_verify_names_what_is_bad(moecc: Any, local: Path) -> None:
    assert moecc("verify")[:2] == (0, "2 entries are good, 0 files are bad\n")
    path = entries(local)[0]
    path.write_bytes(path.read_bytes()[:100])
    (local / "v1" / ENVIRONMENT.hash / "manifest.json").unlink()
    (local / "v1" / "stray").touch()
    code, output, _ = moecc("verify", "--json")
    assert code == 1
    report = json.loads(output)
    assert report["good"] == 1
    assert {Path(name).name for name in report["problems"]} == {path.name, "manifest.json", "stray"}


def test_gc_removes_what_is_broken_old_or_too_much(moecc: Any, local: Path) -> None:
    broken, stale, young = entries(local)[0], local / "v1" / ".x.1.tmp", local / "v1" / ".y.2.tmp"
    broken.write_bytes(b"{")
    stale.touch()
    young.touch()
    os.utime(stale, (0, time.time() - 7200))
    removed = as_json(moecc("gc", "--dry-run", "--json"))
    assert (len(removed["broken"]), removed["stale"], removed["old"]) == (1, ["v1/.x.1.tmp"], [])
    assert broken.exists()
    assert moecc("gc")[0] == 0
    assert (broken.exists(), stale.exists(), young.exists()) == (False, False, True)
    assert len(as_json(moecc("gc", "--max-mb", 1, "--json"))["too_much"]) == 0
    assert len(as_json(moecc("gc", "--max-mb", 0, "--dry-run", "--json"))["too_much"]) == 1
    assert len(as_json(moecc("gc", "--older-than-days", 0, "--json"))["old"]) == 1
    assert not entries(local)


def test_push_and_pull(moecc: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"file://{tmp_path}/shared"
    code, _, errors = moecc("push", uri)
    assert code == 2
    assert errors == f"error: {uri}: is read-only; hint: moecc cache push '{uri}?write=1'\n"
    assert as_json(moecc("push", f"{uri}?write=1", "--json")) == {"written": 2, "unchanged": 0, "refused": []}
    assert as_json(moecc("push", f"{uri}?write=1", "--json"))["unchanged"] == 2
    other = tmp_path / "other"
    monkeypatch.setenv("MOECC_CACHE_REMOTE", uri)
    assert as_json(moecc("pull", "--cache", other, "--json"))["written"] == 2
    assert len(entries(other)) == 2
    assert moecc("verify", "--cache", other)[0] == 0
    monkeypatch.delenv("MOECC_CACHE_REMOTE")
    assert moecc("pull")[0] == 2


@pytest.mark.parametrize("kind", ["redis", pytest.param("s3", marks=pytest.mark.slow)])
def test_push_and_pull_through_a_server(
    kind: str, moecc: Any, local: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue(f"{kind}_uri")
    assert as_json(moecc("push", f"{uri}{'&' if '?' in uri else '?'}write=1", "--json"))["written"] == 2
    assert as_json(moecc("pull", uri, "--cache", tmp_path / "other", "--json"))["written"] == 2
    assert moecc("verify", "--cache", tmp_path / "other")[0] == 0


def test_a_remote_that_is_down_is_an_error_of_one_line(moecc: Any, local: Path) -> None:
    code, _, errors = moecc("pull", "http://127.0.0.1:1")
    assert code == 1
    assert errors.count("\n") == 1
    assert "Connection refused" in errors


def test_what_is_signed(moecc: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"file://{tmp_path}/shared"
    public = moecc("keygen", tmp_path / "key")[1].strip()
    monkeypatch.setenv("MOECC_CACHE_TRUSTED", public)
    assert moecc("push", f"{uri}?write=1")[0] == 2
    monkeypatch.setenv("MOECC_CACHE_SIGNING_KEY", str(tmp_path / "key"))
    assert as_json(moecc("push", f"{uri}?write=1", "--json"))["written"] == 2
    other = tmp_path / "other"
    assert as_json(moecc("pull", uri, "--cache", other, "--json"))["written"] == 2
    assert moecc("verify", "--signed", "--cache", other)[0] == 0
    assert moecc("verify", "--signed")[0] == 1
    cache(tmp_path / "forged", f"{uri}?write=1").put(record(64))
    refused = as_json(moecc("pull", uri, "--cache", other, "--json"))["refused"]
    assert [line.rpartition(": ")[2] for line in refused] == ["it is not signed"]


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_export_and_import(form: str, moecc: Any, local: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "exported", tmp_path / "other"
    entries(local)[0].with_name("0" * 32 + ".json").write_bytes(b"{}")
    code, _, errors = moecc("export", path, "--format", form)
    assert code == 0
    assert errors.count("note: ") == 1
    assert as_json(moecc("import", path, "--format", form, "--cache", other, "--json")) == {"notes": []}
    assert cache(other).get(key(16)) == record(16)
    assert cache(other).get(key(32)) == record(32, measured(16, 40.0))


def test_an_exported_folder_can_be_served_and_pulled(moecc: Any, local: Path, tmp_path: Path) -> None:
    assert moecc("export", tmp_path / "served", "--format", "folder")[0] == 0
    with http_server(tmp_path / "served", read_only=True) as uri:
        assert as_json(moecc("pull", uri, "--cache", tmp_path / "other", "--json"))["written"] == 2
        assert len(list(open_remote(uri).store.names("v1/"))) == 3


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema":"moecc.autotune.bundle/1","files":[]}', b"\xff", b"[" * 99999]
)
def test_what_is_no_bundle_is_refused(content: bytes, moecc: Any, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(content)
    code, _, errors = moecc("import", path, "--cache", tmp_path / "cache")
    assert code == 2
    assert errors.startswith(f"error: {path}: ")
    assert errors.count("\n") == 1


def test_a_bundle_with_names_that_lead_elsewhere_writes_nothing(moecc: Any, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    names = [
        "../../x.json",
        "/etc/x",
        f"v1/{'0' * 32}/entries/../../../x.json",
        f"v1/{'0' * 32}/entries/x.json",
    ]
    path.write_text(json.dumps({"schema": "moecc.autotune.bundle/1", "files": {name: {} for name in names}}))
    assert as_json(moecc("import", path, "--cache", tmp_path / "cache", "--json")) == {"notes": []}
    assert {item.name for item in tmp_path.iterdir()} == {"bundle"}


def test_an_empty_cache_is_no_error(moecc: Any, tmp_path: Path) -> None:
    for command in ("ls", "stats", "verify", "gc"):
        assert moecc(command, "--cache", tmp_path / "none")[0] == 0
