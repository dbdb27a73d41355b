"""A local Hugging Face checkpoint: tensors by name, each read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Checkpoint:
    """files: of every tensor, the file in the folder that holds it. Files are mapped, and opened when first needed."""

    folder: Path
    files: Mapping[str, str]
    _open: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype by torch's name. Raises InputError for one that is not a plain floating-point number."""
        stored = str(self._slice(name).get_dtype())
        if stored not in FLOATS:
            raise InputError(
                f"{name} is stored as {stored}",
                where=str(self.folder / self.files[name]),
                hint=f"give a checkpoint that is not quantised: {', '.join(FLOATS.values())}",
            )
        return FLOATS[stored]

    def read(self, name: str, part: tuple[int | slice, ...]) -> Tensor:
        """The tensor indexed by `part`; the rest of it is not read."""
        tensor: Tensor = self._slice(name)[part]
        return tensor

    def _slice(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = _opened(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except Exception as error:  # SafetensorError is no OSError
            raise InputError(
                f"lacks {name}, which {INDEX} places there",
                where=str(self.folder / file),
                hint="download the checkpoint again",
            ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder: `model.safetensors`, or the shards that its index names.

    Raises InputError for a folder that has neither, an index that is damaged, and where safetensors is missing.
    """
    index = folder / INDEX
    if index.is_file():
        return Checkpoint(folder, _indexed(index))
    if not (folder / SINGLE).is_file():
        raise InputError(
            f"holds neither {SINGLE} nor {INDEX}",
            where=str(folder),
            hint="give the folder of a local Hugging Face checkpoint; nothing is downloaded",
        )
    return Checkpoint(folder, dict.fromkeys(_opened(folder / SINGLE).keys(), SINGLE))


def _indexed(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(
            "is no index of a checkpoint", where=str(index), hint="download the checkpoint again"
        ) from None
    outside = next((file for file in names.values() if Path(file).name != file), None)
    if outside is not None:
        raise InputError(
            f"names a file outside its folder: {outside}", where=str(index), hint="do not use it"
        )
    return names


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise InputError("reading weights needs safetensors", hint="pip install 'moecc[weights]'") from error
    if not file.is_file():
        raise InputError("is missing", where=str(file), hint="download the checkpoint again")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # SafetensorError is no OSError
        raise InputError(
            f"is no safetensors file ({error})", where=str(file), hint="download the checkpoint again"
        ) from error
