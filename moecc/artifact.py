"""The compiled artifact: a folder that is complete or absent.

Files are written to a temporary folder beside the destination, which takes the destination's place by renames. A
reader sees the old artifact, none for an instant, or the new one, never a mixture; a killed compile leaves at most
a hidden folder that the next compile into the same place removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moecc.errors import InputError, MoeccError

SCHEMA = "moecc.artifact/1"
MANIFEST = "manifest.json"
TOOLS = ("moecc", "torch", "triton", "ortools", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk: every file of the manifest is there with its recorded hash."""

    folder: Path
    manifest: Mapping[str, Any]

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions of what shapes an artifact; absent packages are left out."""
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            versions[tool] = version(tool)
    return versions


def check_destination(folder: Path) -> None:
    """Raises InputError where an artifact cannot be written, or writing it would destroy something else."""
    hint = "choose another -o, or remove it yourself"
    try:
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        folder.exists()
    except OSError as error:
        raise InputError(f"is no possible folder: {error.strerror}", where=str(folder), hint=hint) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot be made in {parent}", where=str(folder), hint="choose another -o")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError("is not a folder", where=str(folder), hint=hint)
    if folder.is_dir() and any(folder.iterdir()):
        known = _manifest_files(folder)
        if known is None:
            raise InputError("holds files but no moecc manifest", where=str(folder), hint=hint)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.is_dir() and "__pycache__" not in name.parts and str(name) not in known:
                raise InputError(f"holds {name}, which moecc did not write", where=str(folder), hint=hint)
    if folder.is_dir() and folder.resolve() == Path.cwd().resolve():
        raise InputError("is the working folder", where=str(folder), hint="choose a folder of its own for -o")


def _manifest_files(folder: Path) -> set[str] | None:
    """The files of the artifact in the folder, its manifest too; None if it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not str(manifest.get("schema", "")).startswith("moecc.artifact/"):
        return None
    files = manifest.get("files")
    return {MANIFEST, *map(str, files)} if isinstance(files, dict) else None


def write_artifact(folder: Path, files: Mapping[str, str | bytes], inputs: Mapping[str, str]) -> Artifact:
    """Writes `files` (relative path -> content) and their manifest as the artifact `folder`, all or nothing.

    inputs: name -> sha256 of what was compiled. Of two writers at once the later one wins as a whole.
    Raises InputError for a destination that is not an artifact, MoeccError when the disk refuses.
    """
    check_destination(folder)
    contents = {name: c.encode() if isinstance(c, str) else c for name, c in files.items()}
    manifest = {
        "schema": SCHEMA,
        "versions": tool_versions(),
        "inputs": dict(inputs),
        "files": {name: sha256(content) for name, content in sorted(contents.items())},
    }
    contents[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _replace(folder, contents)
    except OSError as error:
        raise MoeccError(
            f"cannot write the artifact: {error.strerror or error}",
            where=str(folder),
            hint="an artifact that stood there is as it was",
        ) from None
    return Artifact(folder, manifest)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time for each destination; the lock dies with its process."""
    path = folder.parent / f".{folder.name}.lock"
    handle = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path) -> int:
    """A locked descriptor of the file that now has the name: the previous holder unlinks it when it is done."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    _recover(folder)
    fresh = folder.parent / f".{folder.name}.new-{os.getpid()}"
    fresh.mkdir()
    try:
        for name, content in contents.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        check_destination(folder)
        old = folder.parent / f".{folder.name}.old"
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Undoes what a killed writer left: a moved-away artifact comes back, temporary folders go."""
    old = folder.parent / f".{folder.name}.old"
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    for left in folder.parent.glob(f".{folder.name}.new-*"):
        shutil.rmtree(left, ignore_errors=True)


def load_artifact(folder: Path) -> Artifact:
    """Opens an artifact and verifies every file. Raises InputError that names the first file that is wrong."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            "is not a moecc artifact", where=str(folder), hint="make one: moecc compile model.yaml -o DIR"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError("is not readable JSON", where=str(path), hint="compile again") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("schema") != SCHEMA:
        raise InputError(f"is not a manifest of schema {SCHEMA}", where=str(path), hint="compile again")
    for name, digest in files.items():
        _verify_file(folder, str(name), digest)
    return Artifact(folder, manifest)


def _verify_file(folder: Path, name: str, digest: object) -> None:
    path = folder / name
    if "\0" in name or folder.resolve() not in path.resolve().parents:
        raise InputError(
            f"names a file outside the artifact: {name}", where=str(folder / MANIFEST), hint="do not use it"
        )
    try:
        found = sha256(path.read_bytes())
    except (OSError, ValueError):
        raise InputError("is missing", where=str(path), hint="compile again") from None
    if found != digest:
        raise InputError("is not the file that was compiled", where=str(path), hint="compile again")
