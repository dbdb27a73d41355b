"""The folder that vLLM's VLLM_TUNED_CONFIG_FOLDER names."""

from __future__ import annotations

from pathlib import Path

from moecc.autotune.formats.engine_files import Engine, read_files, write_files
from moecc.autotune.fused_moe import KERNEL
from moecc.autotune.remotes.store import Source, Store

_ENGINE = Engine(kernel=KERNEL, space="", by_version=False)


def write(store: Source, path: Path) -> list[str]:
    """Only records of vLLM's own kernel."""
    return write_files(store, path, _ENGINE)


def read(path: Path, store: Store) -> list[str]:
    return read_files(path, store, _ENGINE)
