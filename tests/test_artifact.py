"""Artifacts are complete or absent, whatever happens to the writer."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moecc.artifact import MANIFEST, check_destination, load_artifact, write_artifact
from moecc.errors import InputError, MoeccError

# Writes artifact after artifact of 40 files that all hold the same letter, until it is killed.
WRITER = """
import sys
from pathlib import Path
from moecc.artifact import write_artifact
folder, letters = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for n in range(10_000):
    letter = letters[n % len(letters)]
    write_artifact(folder, {f"d{i % 4}/f{i}": letter * 2000 for i in range(40)}, {"letter": letter})
"""


def _writer(folder: Path, letters: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), letters]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _letter(folder: Path) -> str:
    """The letter that every file of the artifact holds; fails on a mixture."""
    artifact = load_artifact(folder)
    assert len(artifact.manifest["files"]) == 40
    letters = {artifact.read(name)[0] for name in artifact.manifest["files"]}
    assert letters == {artifact.manifest["inputs"]["letter"]}
    return letters.pop()


def test_a_killed_writer_leaves_an_artifact_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for kill in range(12):
        process = _writer(folder, "ab")
        time.sleep(0.002 + 0.0053 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            assert _letter(folder) in "ab"
    write_artifact(folder, {"only": "z"}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "the next writer cleans up"
    assert load_artifact(folder).read("only") == "z"


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    writers = [_writer(folder, letter) for letter in "ab"]
    seen = set()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and seen != {"a", "b"}:
        manifest = folder / MANIFEST
        try:
            seen.add(json.loads(manifest.read_text())["inputs"]["letter"])
        except OSError:
            continue
    for writer in writers:
        writer.send_signal(signal.SIGTERM)
        writer.wait()
    assert seen == {"a", "b"}
    write_artifact(folder, {"f": "c"}, {})
    assert load_artifact(folder).read("f") == "c"


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_artifact(folder, {"f": "old"}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(MoeccError, match="cannot write the artifact") as caught:
            write_artifact(folder, {"f": "new", "large": b"x" * 100_000}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.exit_code == 1
    assert load_artifact(folder).read("f") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1").write_text("years of work")
    with pytest.raises(
        InputError, match="thesis: holds files but no moecc manifest; hint: choose another -o"
    ):
        write_artifact(folder, {"f": "x"}, {})
    assert (folder / "chapter1").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for other in (file, link):
        with pytest.raises(InputError, match="is not a folder"):
            check_destination(other)


def test_what_moecc_did_not_write_is_not_deleted(tmp_path: Path) -> None:
    """A user's file inside an artifact, be it the very model.yaml, is worth more than a compile."""
    folder = tmp_path / "out"
    write_artifact(folder, {"kernels/moe.py": "x"}, {})
    (folder / "kernels/__pycache__").mkdir()
    (folder / "kernels/__pycache__/moe.pyc").write_text("left by a run")
    write_artifact(folder, {"kernels/moe.py": "y"}, {})
    (folder / "kernels/notes.txt").write_text("years of work")
    with pytest.raises(
        InputError, match="out: holds kernels/notes.txt, which moecc did not write; hint: choose"
    ):
        write_artifact(folder, {"kernels/moe.py": "z"}, {})
    assert load_artifact(folder).read("kernels/moe.py") == "y"
    assert (folder / "kernels/notes.txt").read_text() == "years of work"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_artifact(folder, {"f": "x"}, {"model.yaml": "abc"})
    assert load_artifact(folder).manifest["inputs"] == {"model.yaml": "abc"}


def test_an_impossible_destination_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made in .*file; hint: choose another -o"):
        check_destination(tmp_path / "file" / "sub" / "out")
    with pytest.raises(InputError, match="is no possible folder: File name too long"):
        check_destination(tmp_path / ("x" * 300))
    check_destination(tmp_path / "not" / "yet" / "there")


def test_the_working_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the working folder"):
        check_destination(Path("."))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "d/f").write_text("y"),
            "d/f: is not the file that was compiled; hint: compile again",
        ),
        (lambda f: (f / "d/f").unlink(), "d/f: is missing; hint: compile again"),
        (lambda f: (f / MANIFEST).unlink(), "is not a moecc artifact; hint: make one: moecc compile"),
        (
            lambda f: (f / MANIFEST).write_text("{"),
            "manifest.json: is not readable JSON; hint: compile again",
        ),
        (lambda f: (f / MANIFEST).write_text("[]"), "is not a manifest of schema moecc.artifact/1"),
        (
            lambda f: (f / MANIFEST).write_text(
                json.dumps({"schema": "moecc.artifact/1", "files": {"../../etc/passwd": "x"}})
            ),
            "names a file outside the artifact: ../../etc/passwd",
        ),
    ],
)
def test_a_damaged_artifact_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "out"
    write_artifact(folder, {"d/f": "x"}, {})
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_artifact(folder)
    assert message in str(caught.value)
