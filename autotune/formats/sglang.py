"""SGLang's folder `configs`, with one folder for each version of Triton."""

from __future__ import annotations

from pathlib import Path

from moecc.autotune.formats.engine_files import Engine, read_files, write_files
from moecc.autotune.remotes.store import Source, Store

_ENGINE = Engine(kernel="sglang.fused_moe", space=" ", by_version=True)


def write(store: Source, path: Path) -> list[str]:
    """Only records of SGLang's own kernel."""
    return write_files(store, path, _ENGINE)


def read(path: Path, store: Store) -> list[str]:
    return read_files(path, store, _ENGINE)
