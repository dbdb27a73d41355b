"""Forms in which a cache travels. One more is one file with `write` and `read`, and one line in `FORMATS`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from moecc.autotune.remotes.store import Source, Store
from moecc.errors import InputError

FORMATS = {
    "bundle": "bundle",
    "folder": "folder",
    "vllm": "vllm",
    "sglang": "sglang",
}
"""Name: module beside this one."""


class Format(Protocol):
    """A module. Notes are lines for the user, such as what the form cannot say."""

    def write(self, store: Source, path: Path) -> list[str]:
        """Writes every good entry of the store; the notes. MoeccError where it cannot be written."""

    def read(self, path: Path, store: Store) -> list[str]:
        """Merges everything good into the store; the notes. InputError for what is no such form."""


def find_format(name: str) -> Format:
    """InputError for a name that is not in the table."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}", where="--format", hint=f"known: {', '.join(FORMATS)}")
    module: Format = importlib.import_module(f"{__name__}.{FORMATS[name]}")
    return module
