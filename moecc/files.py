"""Files that are complete under their names, or not there at all."""

from __future__ import annotations

import secrets
from pathlib import Path

from moecc.errors import InputError, MoeccError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces `path` by the content at once. Raises MoeccError when the disk refuses."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MoeccError(
            f"cannot be written: {error.strerror or error}", where=str(path), hint="check the folder"
        ) from None


def check_writable(path: Path) -> None:
    """Raises InputError where a file could not be written, before work is done for it."""
    if path.is_dir():
        raise InputError("is a folder", where=str(path), hint="name a file")
    if not path.parent.is_dir():
        raise InputError("its folder does not exist", where=str(path), hint="make the folder first")


def read_text(path: Path, hint: str) -> str:
    """Raises InputError where the file cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path), hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path), hint=hint) from None
