"""Files of other programs, read without trust: sizes are judged first, nothing is unpickled beyond plain tensors, and
whatever is wrong is an InputError of one line."""

from __future__ import annotations

import binascii
import io
import json
import lzma
import pickle
import struct
import tokenize
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError, Location, MoeccError

MAX_BYTES = 4 << 30
# Deflate reaches 1032:1 on zeros; expert ids and counts stay far below. Small files may be as uniform as they like.
MAX_RATIO, RATIO_FREE_BYTES = 200, 64 << 20
NUMPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
Ints = NDArray[np.int64]

_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    SyntaxError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # RecursionError and NotImplementedError are some
    MemoryError,
    ImportError,
    struct.error,
    tokenize.TokenError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    binascii.Error,
)


def wrong(path: Path | str, what: str, hint: str) -> NoReturn:
    raise InputError(what, where=str(path), hint=hint)


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns. Errors: InputError instead of anything that a damaged file can raise."""
    try:
        return read()
    except FileNotFoundError:
        wrong(path, "there is no such file", "check the path")
    except IsADirectoryError:
        wrong(path, "this is a folder", "name one file")
    except MoeccError:
        raise
    except _UNREADABLE as error:
        what = " ".join(str(error).split()) or type(error).__name__
        wrong(
            path, f"the file is damaged or of another kind ({what[:160].rstrip('.')})", "write the file again"
        )


def head(path: Path, size: int = 4096) -> bytes:
    def read() -> bytes:
        with path.open("rb") as stream:
            return stream.read(size)

    return bytes(guarded(path, read))


def read_text(path: Path) -> str:
    def read() -> str:
        size = path.stat().st_size
        if size > MAX_BYTES:
            wrong(path, f"the file has {size} bytes", "files of more than 4 GiB are not read: split it")
        return path.read_text(encoding="utf-8-sig")

    return str(guarded(path, read))


def parse_json(path: Path, text: str, line: int = 1) -> Any:
    """The value of a JSON text that begins on `line` of the file. Errors: InputError at line and column."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = Location(str(path), line + error.lineno - 1, error.colno)
        raise InputError(f"not valid JSON: {error.msg}", where=where, hint="write the file again") from None
    except (ValueError, RecursionError) as error:
        wrong(path, f"not usable JSON ({str(error)[:100]})", "use plain numbers, lists and objects")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_json_object(path: Path) -> dict[str, Any]:
    data = parse_json(path, read_text(path))
    if not isinstance(data, dict):
        wrong(path, f"it holds a {type(data).__name__}, not an object", "give the file that the engine reads")
    return data


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of every line that is not blank."""
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            value = parse_json(path, line, number)
            if not isinstance(value, dict):
                wrong(
                    f"{path}:{number}",
                    f"it holds a {type(value).__name__}, not an object",
                    "one object a line",
                )
            records.append((number, value))
    return records


def read_npy(path: Path, data: bytes | None = None) -> NDArray[Any]:
    """The array of a .npy file, or of its bytes in `data`; Python objects are refused."""

    def read() -> NDArray[Any]:
        content = io.BytesIO(data) if data is not None else path.open("rb")
        with content as stream:
            stream.seek(0, io.SEEK_END)
            if stream.tell() > MAX_BYTES:
                wrong(path, f"it holds {stream.tell()} bytes", "split it: 4 GiB are read at most")
            stream.seek(0)
            if stream.read(len(NUMPY_MAGIC)) != NUMPY_MAGIC:
                raise ValueError("no .npy header")
            stream.seek(0)
            return np.asarray(np.load(stream, allow_pickle=False, max_header_size=10_000))

    array: NDArray[Any] = guarded(path, read)
    return array


def decode_npy(path: Path, text: str) -> NDArray[Any]:
    """The array in base64 of a .npy file."""
    data: bytes = guarded(path, lambda: b64decode("".join(text.split()), validate=True))
    return read_npy(path, data)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that the file has."""

    def read() -> dict[str, NDArray[Any]]:
        with zipfile.ZipFile(path) as archive:
            _refuse_bombs(path, archive)
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names if name in file.files}

    arrays: dict[str, NDArray[Any]] = guarded(path, read)
    return arrays


def archive_names(path: Path) -> list[str]:
    def read() -> list[str]:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()

    names: list[str] = guarded(path, read)
    return names


def _refuse_bombs(path: Path, archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    total, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if total > MAX_BYTES or (total > RATIO_FREE_BYTES and total > MAX_RATIO * max(packed, 1)):
        wrong(
            path, f"it would unpack to {total} bytes", "4 GiB are read at most, compressed 200 times at most"
        )


def read_torch(path: Path) -> Mapping[str, Any]:
    """The dictionary that torch.save wrote: tensors, numbers, texts and lists of them; nothing else is unpickled.

    Errors: InputError, also for files that pickle anything that could run.
    """

    def read() -> Any:
        import torch

        with zipfile.ZipFile(path) as archive:
            _refuse_bombs(path, archive)
        return torch.load(path, map_location="cpu", weights_only=True)

    data = guarded(path, read)
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        wrong(
            path,
            f"it holds a {type(data).__name__}, not a dictionary",
            "give a dump of the engine's recorder",
        )
    return data


def tensor_ints(path: Path, name: str, value: Any, rank: Sequence[int]) -> Ints:
    """A tensor, array or nested list as integers. Errors: InputError naming it, and the dimensions it may have."""
    where = f"{path}: {name}"
    if value is None:
        wrong(path, f"'{name}' is missing", "give the file as the engine wrote it")

    def read() -> NDArray[Any]:
        if hasattr(value, "numel"):
            if value.is_sparse or value.numel() * 8 > MAX_BYTES:
                raise ValueError("not a dense tensor of at most 4 GiB")
            if value.is_complex() or (value.is_floating_point() and not bool((value == value.round()).all())):
                raise ValueError(f"{value.dtype} is not an integer type")
            return np.asarray(value.long().contiguous().numpy())
        return np.asarray(value)

    array: NDArray[Any] = guarded(Path(where), read)
    if array.dtype.kind not in "iu" or array.ndim not in rank or 0 in array.shape:
        shape = f"{array.dtype} {list(array.shape)}"
        wrong(
            where,
            f"it is {shape}",
            f"integers of {' or '.join(map(str, rank))} dimensions, none of them empty",
        )
    if array.dtype == np.uint64 and array.max() >= 2**63:
        wrong(where, "a number is too large", "expert ids and counts fit 63 bits")
    return array.astype(np.int64)
