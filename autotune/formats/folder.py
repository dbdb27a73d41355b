"""A folder as the cache has it, with an index: for a static web server, a git repository, a drive."""

from __future__ import annotations

from pathlib import Path

from moecc.autotune.canonical import canonical
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.remotes.http import INDEX
from moecc.autotune.remotes.store import Source, Store
from moecc.autotune.sharing import LAYOUT, is_known_name
from moecc.autotune.upkeep import copy_all
from moecc.errors import InputError
from moecc.files import write_atomic


def write(store: Source, path: Path) -> list[str]:
    """Merges into what the folder has, and names all of it in its index."""
    folder = Folder(path)
    copied = copy_all(store, folder)
    path.mkdir(parents=True, exist_ok=True)
    names = [name for name in folder.names(f"{LAYOUT}/") if is_known_name(name)]
    write_atomic(path / INDEX, canonical({"names": names}))
    return copied.refused


def read(path: Path, store: Store) -> list[str]:
    if not path.is_dir():
        raise InputError("there is no such folder", where=str(path), hint="name what export wrote")
    return copy_all(Folder(path), store).refused
