"""Files of tuned configs of vLLM and SGLang: read, kept as records, written again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cache_samples import ENVIRONMENT, cache, key, record
from hypothesis import given
from hypothesis import strategies as st
from tuned_entries import TUNED

from moecc.autotune.formats import find_format
from moecc.autotune.formats.tuned_files import TunedFile, TunedName, parse_file, parse_name
from moecc.autotune.record import Measurement, merge
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.sharing import add_manifest, add_record, read_record, scan
from moecc.cli import main
from moecc.errors import InputError

NAME = "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128,128].json"
CONFIG = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """(exit code, stdout, stderr) of moecc cache ..."""
    monkeypatch.setattr(sys, "argv", ["moecc", "cache", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


def contents(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")
    }


words = st.from_regex(r"[A-Za-z0-9_().-]{1,20}", fullmatch=True)


@given(
    name=st.builds(
        TunedName,
        experts=st.integers(1, 999),
        intermediate=st.integers(1, 99999),
        device=words,
        dtype=st.none() | st.sampled_from(["fp8_w8a8", "int8_w8a16"]),
        block_shape=st.none() | st.tuples(st.integers(1, 256), st.integers(1, 256)),
        per_channel=st.booleans(),
        backend=st.none() | st.just("flydsl"),
        down=st.booleans(),
    ),
    space=st.sampled_from(["", " "]),
)
def test_names_are_read_as_they_are_written(name: TunedName, space: str) -> None:
    assert parse_name(name.file_name(space=space)) == name


@given(configs=st.dictionaries(st.integers(1, 1 << 20), st.just(CONFIG)), triton=st.none() | words)
def test_files_are_read_as_they_are_written(configs: dict[int, Any], triton: str | None) -> None:
    name = parse_name(NAME)
    assert name is not None
    file = TunedFile(name=name, configs=configs, triton=triton)
    assert parse_file(NAME, file.content()) == file


@pytest.mark.skipif(not TUNED.is_dir(), reason="tuned configs absent: set MOECC_SHARED")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_all_shipped_files_survive_the_cache(engine: str, tmp_path: Path) -> None:
    store = Folder(tmp_path / "cache")
    (note,) = find_format(engine).read(TUNED / engine, store)
    assert "hidden size" in note
    assert find_format(engine).write(store, tmp_path / "out") == [note]
    there = contents(TUNED / engine)
    assert len(there) > 200
    assert contents(tmp_path / "out") == there


def test_a_folder_for_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import of a file, a record of moecc's own kernel beside it, export: only vLLM's kernel is in the folder."""
    files, local = tmp_path / "files", tmp_path / "cache"
    files.mkdir()
    content = {"triton_version": "3.5.0", "1": CONFIG, "64": {**CONFIG, "BLOCK_SIZE_M": 64}}
    (files / NAME).write_text(json.dumps(content))
    cache(local).put(record(16))
    code, _, notes = run(capsys, monkeypatch, "import", files / NAME, "--format", "vllm", "--cache", local)
    assert code == 0
    assert notes.startswith("note: the files say neither hidden size nor top_k: a config may have been tuned")
    code, _, notes = run(
        capsys, monkeypatch, "export", tmp_path / "out", "--format", "vllm", "--cache", local
    )
    assert code == 0
    assert "note: left out: 1 records of kernel moecc\n" in notes
    assert contents(tmp_path / "out") == {NAME: content}
    listed = json.loads(run(capsys, monkeypatch, "ls", "--cache", local, "--json")[1])
    assert {row["best_us"] for row in listed["entries"]} == {None, 10.0}
    assert "NVIDIA_H100_80GB_HBM3" in run(capsys, monkeypatch, "ls", "--cache", local)[1]
    assert run(capsys, monkeypatch, "stats", "--cache", local)[0] == 0
    assert run(capsys, monkeypatch, "verify", "--cache", local)[0] == 0
    claimed = next(row["key"] for row in listed["entries"] if row["best_us"] is None)
    assert "claimed" in run(capsys, monkeypatch, "show", claimed, "--cache", local)[1]
    code, _, notes = run(
        capsys, monkeypatch, "export", tmp_path / "sgl", "--format", "sglang", "--cache", local
    )
    assert "2 records of kernel vllm.fused_moe" in notes
    assert contents(tmp_path / "sgl") == {}


def test_sglangs_folders_are_versions_of_triton(tmp_path: Path) -> None:
    files, store = tmp_path / "configs", Folder(tmp_path / "cache")
    name = NAME.replace("[128,128]", "[128, 128]").replace(".json", "_down.json")
    for version, tokens in (("triton_3_4_0", "1"), ("triton_3_5_1", "2")):
        (files / version).mkdir(parents=True)
        (files / version / name).write_text(json.dumps({tokens: CONFIG}))
    find_format("sglang").read(files, store)
    find_format("sglang").write(store, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(files)


def test_of_equal_keys_the_latest_is_written(tmp_path: Path) -> None:
    """Two layers of different hidden size meet in one file, which does not say it."""
    local = tmp_path / "cache"
    for hidden, block_m, date in ((2048, 16, "2026-01-03"), (4096, 32, "2026-01-02")):
        one = replace(key(16), kernel="vllm.fused_moe", hidden=hidden)
        best = Measurement(config={**CONFIG, "BLOCK_SIZE_M": block_m}, median_us=5.0, spread_us=0.1)
        cache(local).put(replace(record(16), key=one, measured=(best,), date=f"{date}T00:00:00+00:00"))
    notes = find_format("vllm").write(Folder(local), tmp_path / "out")
    assert notes[1:] == ["1 records have an equal key in the files: the latest are written"]
    name = f"E=128,N=768,device_name={ENVIRONMENT.device.replace(' ', '_')}.json"
    assert contents(tmp_path / "out") == {name: {"triton_version": "3.7.1", "16": CONFIG}}


@pytest.mark.parametrize("device", ["../../../x", "a/b", "a,b", "x\\y"])
def test_names_that_lead_elsewhere_write_nothing(device: str, tmp_path: Path) -> None:
    store = Folder(tmp_path / "cache")
    environment = replace(ENVIRONMENT, device=device)
    add_manifest(store, environment)
    hostile = replace(record(16, environment=environment), key=replace(key(16), kernel="vllm.fused_moe"))
    add_record(store, hostile, accepted=partial(read_record, trusted=None))
    notes = find_format("vllm").write(store, tmp_path / "out")
    assert notes[1].endswith(": device and precision make no name of a file")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_a_claim_yields_to_every_measurement(tmp_path: Path) -> None:
    claim = Measurement(config=CONFIG, outcome="claimed")
    slow = Measurement(config=CONFIG, median_us=9.0, spread_us=0.0)
    other = Measurement(config={**CONFIG, "num_warps": 8}, median_us=99.0, spread_us=0.0)
    assert record(16, claim).best == claim
    assert record(16, claim, other).best == other
    assert merge(record(16, claim), record(16, slow, other)).measured == (slow, other)
    cache(tmp_path).put(record(16, claim))
    assert [found.record for found in scan(Folder(tmp_path))] == [record(16, claim)]
    with pytest.raises(InputError, match="what is claimed has no time"):
        Measurement(config=CONFIG, outcome="claimed", median_us=1.0, spread_us=0.0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "configs.json",
            b"{}",
            "configs.json: the name is not that of a file of tuned configs; hint: names are E=",
        ),
        (NAME, b"{", "is no JSON (Expecting property name enclosed in double quotes"),
        (NAME, b"[" * 99999, "is no JSON ("),
        (NAME, b"[]", "is no object of configs by token count; hint: give a file as vLLM's"),
        (NAME, b'{"-1": {"a": 1}}', "'-1' is no count of tokens"),
        (NAME, b'{"0": {"a": 1}}', "'0' is no count of tokens"),
        (NAME, b'{"1": 3}', "the config of 1 tokens is no flat object"),
        (NAME, b'{"1": {"a": [1]}}', "the config of 1 tokens is no flat object"),
        (NAME, b'{"1": {"a": 9007199254740999}}', "the config of 1 tokens is no flat object"),
        (NAME, b'{"1": {"a": 1}, "1": {"a": 2}}', "a field is there twice"),
        (NAME, b'{"triton_version": 3}', "triton_version is no text"),
    ],
)
def test_what_is_no_such_file_is_refused(
    name: str,
    data: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    arguments = ("--format", "vllm", "--cache", tmp_path / "cache")
    code, _, errors = run(capsys, monkeypatch, "import", path, *arguments)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    code, _, errors = run(capsys, monkeypatch, "import", tmp_path, *arguments)
    assert code == 0
    assert errors.count("note: ") == 2, "in a folder it is a note beside the one on what the files lack"


def test_a_path_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("import", tmp_path / "none", "--format", "sglang", "--cache", tmp_path / "cache")
    code, _, errors = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert errors == (
        f"error: {tmp_path / 'none'}: there is no such file or folder; hint: name files of tuned configs\n"
    )


def test_only_what_was_imported_may_leave_sizes_out() -> None:
    with pytest.raises(InputError, match="key hidden: '0' identifies nothing"):
        replace(key(16), hidden=0)
    with pytest.raises(InputError, match="key experts: '0' identifies nothing"):
        replace(key(16), experts=0, layout="not stated")
    assert replace(key(16), hidden=0, top_k=0, layout="not stated").hash != key(16).hash
