"""Tuned-config files of an engine as records of its kernel, and back.

A file says which config was best and not how fast it was: its measurements are `claimed`. What it does not say of
the key and the environment is "not stated" or 0 there, so such a record is never taken for one of moecc's own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from moecc.autotune.canonical import Scalar, parse
from moecc.autotune.entry import dump_entry, dump_manifest
from moecc.autotune.formats.bundle import Unpacked
from moecc.autotune.formats.tuned_files import MAX_FILE_BYTES, TunedFile, TunedName, parse_file, parse_name
from moecc.autotune.key import NOT_STATED, Environment, Key
from moecc.autotune.record import DATE_FORMAT, Measurement, Record
from moecc.autotune.remotes.store import Source, Store
from moecc.autotune.sharing import entry_name, environments, manifest_name, scan
from moecc.autotune.upkeep import copy_all
from moecc.errors import InputError
from moecc.files import write_atomic

LACKING = (
    "the files say neither hidden size nor top_k: a config may have been tuned for another layer "
    "with as many experts of that width"
)
Rows = dict[int, tuple[Record, str]]
"""By token count a record and the version of Triton."""

_VERSION_FOLDER = re.compile(r"triton_(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """kernel: its name in keys. space: see TunedName.file_name. by_version: files lie in folders triton_X_Y_Z."""

    kernel: str
    space: str
    by_version: bool


def read_files(path: Path, store: Store, engine: Engine) -> list[str]:
    """Merges a file, or every one below a folder. Notes: what the files lack, and those that are bad.

    Raises InputError where there is no such file.
    """
    notes, files = [LACKING], {}
    for file, date in _found(path, notes):
        for environment, record in _records(file, engine.kernel, date):
            files[manifest_name(environment.hash)] = parse(dump_manifest(environment))
            files[entry_name(environment.hash, record.key.hash)] = parse(dump_entry(record))
    return notes + copy_all(Unpacked(files), store).refused


def write_files(store: Source, path: Path, engine: Engine) -> list[str]:
    """Writes one file for each name into the folder `path`. Notes: what the files cannot say, and what is left out.

    Of several records for one token count of one file the latest is written.
    """
    notes = [LACKING]
    for (folder, name), rows in _chosen(store, engine, notes).items():
        target = path / folder / name.file_name(space=engine.space)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, _file(name, rows, by_version=engine.by_version).content())
    return notes


def _chosen(store: Source, engine: Engine, notes: list[str]) -> dict[tuple[str, TunedName], Rows]:
    """By folder and name. What hostile entries would write elsewhere has no name of a file and is left out."""
    chosen: dict[tuple[str, TunedName], Rows] = defaultdict(dict)
    others: Counter[str] = Counter()
    known, rivals = environments(store), 0
    for found in scan(store):
        record, environment = found.record, known.get(found.environment)
        if record is None or not isinstance(environment, Environment):
            notes.append(f"{found.name}: {found.problem or 'its environment has no manifest'}")
            continue
        if record.key.kernel != engine.kernel:
            others[record.key.kernel] += 1
            continue
        name = _name(record.key, environment.device)
        if parse_name(name.file_name()) != name:
            notes.append(f"{found.name}: device and precision make no name of a file")
            continue
        rows = chosen[_folder(environment.triton) if engine.by_version else "", name]
        rival = rows.get(record.key.tokens)
        rivals += rival is not None
        if rival is None or rival[0].date <= record.date:
            rows[record.key.tokens] = record, environment.triton
    notes += [f"left out: {count} records of kernel {kernel}" for kernel, count in sorted(others.items())]
    notes += [f"{rivals} records have an equal key in the files: the latest are written"] if rivals else []
    return chosen


def _found(path: Path, notes: list[str]) -> Iterator[tuple[TunedFile, str]]:
    """Each file with the date of its last change."""
    if not path.exists():
        raise InputError(
            "there is no such file or folder", where=str(path), hint="name files of tuned configs"
        )
    names = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    for name in names:
        if path.is_dir() and parse_name(name.name) is None:
            notes.append(f"{name}: the name is not that of a file of tuned configs")
            continue
        try:
            with name.open("rb") as opened:
                file = parse_file(name.name, opened.read(MAX_FILE_BYTES + 1))
        except InputError as error:
            if not path.is_dir():
                raise
            notes.append(str(error))
            continue
        yield _with_version(file, name), _date(name)


def _with_version(file: TunedFile, path: Path) -> TunedFile:
    version = _VERSION_FOLDER.fullmatch(path.absolute().parent.name)
    if version is None or file.triton is not None:
        return file
    return TunedFile(name=file.name, configs=file.configs, triton=".".join(version.groups()))


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime(DATE_FORMAT)


def _records(file: TunedFile, kernel: str, date: str) -> Iterator[tuple[Environment, Record]]:
    environment = Environment(
        device=file.name.device,
        arch=NOT_STATED,
        cores=0,
        features=(),
        driver=NOT_STATED,
        assembler=NOT_STATED,
        triton=file.triton or NOT_STATED,
        kernel_source=NOT_STATED,
        measurement=NOT_STATED,
    )
    for tokens, config in file.configs.items():
        record = Record(
            key=_key(file.name, tokens, kernel),
            environment=environment.hash,
            measured=(Measurement(config=config, outcome="claimed"),),
            baseline_us=None,
            date=date,
            tools={},
        )
        yield environment, record


def _key(name: TunedName, tokens: int, kernel: str) -> Key:
    options: dict[str, Scalar] = {}
    if name.block_shape:
        options |= {"block_n": name.block_shape[0], "block_k": name.block_shape[1]}
    options |= {"per_channel_quant": True} if name.per_channel else {}
    options |= {"backend": name.backend} if name.backend else {}
    options |= {"gemm": "down"} if name.down else {}
    return Key(
        op="experts",
        kernel=kernel,
        experts=name.experts,
        hidden=0,
        intermediate=name.intermediate,
        top_k=0,
        tokens=tokens,
        dtype=NOT_STATED,
        weight_dtype=NOT_STATED,
        quant=name.dtype or "none",
        layout=NOT_STATED,
        activation=NOT_STATED,
        routing=NOT_STATED,
        options=options,
    )


def _name(key: Key, device: str) -> TunedName:
    block = (key.options.get("block_n"), key.options.get("block_k"))
    backend = key.options.get("backend")
    return TunedName(
        experts=key.experts,
        intermediate=key.intermediate,
        device=device.replace(" ", "_"),
        dtype=None if key.quant == "none" else key.quant,
        block_shape=(block[0], block[1]) if isinstance(block[0], int) and isinstance(block[1], int) else None,
        per_channel=key.options.get("per_channel_quant") is True,
        backend=backend if isinstance(backend, str) else None,
        down=key.options.get("gemm") == "down",
    )


def _file(name: TunedName, rows: Rows, *, by_version: bool) -> TunedFile:
    """Where folders stand for versions, files say none; else only one that all rows share."""
    versions = {triton for _, triton in rows.values()}
    stated = len(versions) == 1 and NOT_STATED not in versions and not by_version
    return TunedFile(
        name=name,
        configs={tokens: rows[tokens][0].best.config for tokens in sorted(rows)},
        triton=versions.pop() if stated else None,
    )


def _folder(triton: str) -> str:
    """Of a version X.Y.Z, whatever follows it; none for a version that is not known."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", triton)
    return f"triton_{'_'.join(numbers.groups())}" if numbers else ""
