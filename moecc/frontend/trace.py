"""Routing traces: `.npz` files with `topk_ids` [tokens, layers, top_k] and `num_experts`, one a workload.

Optional arrays: `topk_weights` (same shape), `sequence_ids` [tokens], `homes` [tokens], the device that each token's
attention runs on, and `assumption`, the sentence of a routing that nobody measured, so that it cannot come back as a
measured one. Sizes are judged by the array headers before anything is read; nothing is ever unpickled.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError, Location
from moecc.files import write_atomic
from moecc.frontend.checks import MAX_EXPERTS
from moecc.frontend.spec import ModelSpec
from moecc.solvers.routing import Routing

MAX_ARRAY_BYTES = 4 << 30
# Deflate reaches 1032:1 on zeros; recorded ids stay below 10:1. Small arrays may be as uniform as they like.
MAX_RATIO, RATIO_FREE_BYTES = 200, 64 << 20
MAX_TEXT = 1000
CHUNK_TOKENS = 4096

_KNOWN = ("topk_ids", "num_experts", "topk_weights", "sequence_ids", "homes", "assumption")
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    SyntaxError,
    OverflowError,
    RuntimeError,  # NotImplementedError is one: an unknown compression method
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_DAMAGED = "record the trace again, or copy the file again"


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def load_trace(path: Path, name: str | None = None) -> Routing:
    """The routing in a trace file; its name defaults to the file's.

    Integer ids of any width are accepted when they fit. Tokens without `sequence_ids` are one sequence.
    Errors: InputError, one line with the file, what is wrong with which array, and a hint.
    """
    path = Path(path)
    arrays = _read(path)
    for key in ("topk_ids", "num_experts"):
        if key not in arrays:
            raise _error(path, f"the array '{key}' is missing", "a trace needs topk_ids and num_experts")
    experts = int(arrays["num_experts"].reshape(()))
    ids, weights, sequences = arrays["topk_ids"], arrays.get("topk_weights"), arrays.get("sequence_ids")
    homes = arrays.get("homes")
    for what, hint in _problems(ids, experts, weights, {"sequence_ids": sequences, "homes": homes}):
        raise _error(path, what, hint)
    tokens = ids.shape[0]
    return Routing(
        name=path.stem if name is None else name,
        topk_ids=np.ascontiguousarray(ids, np.int16),
        num_experts=experts,
        sequence_ids=np.zeros(tokens, np.int32) if sequences is None else sequences.astype(np.int32),
        assumption=str(arrays["assumption"]) if "assumption" in arrays else "",
        homes=None if homes is None else homes.astype(np.int32),
    )


def save_trace(
    path: Path, routing: Routing, *, topk_weights: NDArray[np.floating[Any]] | None = None
) -> None:
    """Write a routing as a compressed trace file: complete under its name, or not there at all.

    topk_weights: [tokens, layers, top_k], stored as float16.
    Errors: InputError for a routing that `load_trace` would refuse; MoeccError when the file cannot be written.
    """
    path = Path(path)
    ids, sequences = routing.topk_ids, routing.sequence_ids
    with np.errstate(over="ignore"):
        weights = None if topk_weights is None else topk_weights.astype(np.float16)
    each = {"sequence_ids": sequences, "homes": routing.homes}
    for what, hint in _problems(ids, routing.num_experts, weights, each):
        raise _error(path, what, hint)
    arrays: dict[str, NDArray[Any]] = {
        "topk_ids": ids.astype(np.int16),
        "num_experts": np.array(routing.num_experts),
        "sequence_ids": sequences.astype(np.int32),
    }
    if weights is not None:
        arrays["topk_weights"] = weights
    if routing.homes is not None:
        arrays["homes"] = routing.homes.astype(np.int32)
    if routing.assumption:
        arrays["assumption"] = np.array(routing.assumption[:MAX_TEXT])
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_atomic(path, packed.getvalue())


def check_trace(routing: Routing, model: ModelSpec, where: Location | str) -> None:
    """Errors: InputError at `where` when a trace was not recorded from this model: layers, experts or top_k."""
    for noun, have, want in (
        ("layers", routing.layers, len(model.moe_layers)),
        ("experts", routing.num_experts, model.experts),
        ("experts per token", routing.top_k, model.top_k),
    ):
        if have != want:
            kind = "MoE layers" if noun == "layers" else noun
            raise InputError(
                f"the trace '{routing.name}' has {have} {noun}, the model has {want} {kind}",
                where=where,
                hint="give a trace that was recorded from this model",
            )


def _error(path: Path, what: str, hint: str) -> InputError:
    return InputError(what, where=str(path), hint=hint)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            headers = _headers(archive, path)
        for name, header in headers.items():
            what = _header_problem(name, header)
            if what:
                raise _error(path, what, _HINTS[name])
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in headers}
    except FileNotFoundError:
        raise _error(path, "there is no such file", "check the path of the trace") from None
    except zipfile.BadZipFile as error:
        raise _error(path, f"not a readable .npz file ({str(error).lower()})", _DAMAGED) from None
    except _UNREADABLE as error:
        what = str(error) or type(error).__name__
        raise _error(path, f"the file is damaged ({what.rstrip('.')[:200]})", _DAMAGED) from None


def _headers(archive: zipfile.ZipFile, path: Path) -> dict[str, _Header]:
    """Shape and dtype of each known array, from its first bytes. Errors: InputError for sizes beyond reason."""
    headers: dict[str, _Header] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in _KNOWN or name in headers:
            continue
        bomb = info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1)
        if bomb or info.file_size > MAX_ARRAY_BYTES + (1 << 16):
            raise _too_large(path, name, info.file_size)
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise _error(
                path, f"{name} holds pickled Python objects, which are never loaded", "save plain arrays"
            )
        if dtype.itemsize * math.prod(shape) > MAX_ARRAY_BYTES:
            raise _too_large(path, name, dtype.itemsize * math.prod(shape))
        headers[name] = _Header(shape, dtype)
    return headers


def _too_large(path: Path, name: str, size: int) -> InputError:
    hint = "split the trace: an array may take 4 GiB, and compress 200 times at most"
    return _error(path, f"{name} would unpack to {size} bytes", hint)


_HINTS = {
    "topk_ids": "topk_ids is int16 [tokens, layers, top_k]",
    "num_experts": "num_experts is one integer",
    "topk_weights": "topk_weights is float16 [tokens, layers, top_k]",
    "sequence_ids": "sequence_ids is int32 [tokens]",
    "homes": "homes is int32 [tokens], device numbers",
    "assumption": f"assumption is a text of at most {MAX_TEXT} characters",
}


def _header_problem(name: str, header: _Header) -> str | None:
    kinds, noun, rank = {
        "topk_ids": ("iu", "integers", 3),
        "num_experts": ("iu", "an integer", 0),
        "topk_weights": ("f", "floating-point numbers", 3),
        "sequence_ids": ("iu", "integers", 1),
        "homes": ("iu", "integers", 1),
        "assumption": ("U", "a text", 0),
    }[name]
    if header.dtype.kind not in kinds:
        return f"{name} is {header.dtype}, not {noun}"
    if len(header.shape) != rank and not (name == "num_experts" and header.shape == (1,)):
        return f"{name} has {len(header.shape)} dimensions, not {rank}"
    if name == "assumption" and header.dtype.itemsize > 4 * MAX_TEXT:
        return "assumption is too long"
    return None


def _problems(
    ids: NDArray[Any],
    experts: int,
    weights: NDArray[Any] | None,
    per_token: Mapping[str, NDArray[Any] | None],
) -> Iterator[tuple[str, str]]:
    """What is wrong with a trace as (what, hint); shapes first, then values."""
    if ids.ndim != 3:
        yield f"topk_ids has {ids.ndim} dimensions, not 3", _HINTS["topk_ids"]
        return
    if 0 in ids.shape:
        yield f"the trace is empty: topk_ids has shape {list(ids.shape)}", "record at least one token"
        return
    tokens, _, top_k = ids.shape
    if not 1 <= experts <= MAX_EXPERTS:
        yield f"num_experts {experts} is out of range", f"num_experts must be in [1, {MAX_EXPERTS}]"
        return
    if top_k > experts:
        yield f"top_k {top_k} is larger than num_experts {experts}", "correct num_experts"
        return
    for name, values in per_token.items():
        if values is None:
            continue
        if values.shape != (tokens,):
            yield f"{name} has shape {list(values.shape)} for {tokens} tokens", "one id for each token"
            return
        if not (int(values.min()) >= -(1 << 31) and int(values.max()) < (1 << 31)):
            yield (
                f"{name} do not fit int32",
                "number the sequences from 0" if name == "sequence_ids" else "number devices from 0",
            )
    homes = per_token.get("homes")
    if homes is not None and int(homes.min()) < 0:
        yield f"homes hold {int(homes.min())}", "homes are device numbers from 0"
    if weights is not None and weights.shape != ids.shape:
        yield (
            f"topk_weights has shape {list(weights.shape)}, topk_ids {list(ids.shape)}",
            "give both the same shape",
        )
        return
    for start in range(0, tokens, CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        yield from _value_problems(start, ids[part], experts, None if weights is None else weights[part])


def _value_problems(
    start: int, ids: NDArray[Any], experts: int, weights: NDArray[Any] | None
) -> Iterator[tuple[str, str]]:
    """The same for some tokens; `start` is the index of the first."""
    wrong = np.argwhere((ids < 0) | (ids >= experts))
    if len(wrong):
        token, layer, k = wrong[0]
        yield (
            f"topk_ids[{start + token}, {layer}, {k}] is {ids[token, layer, k]}, not in [0, {experts})",
            "correct num_experts, or leave the token out",
        )
        return
    ranked = np.sort(ids, axis=2)
    twice = np.argwhere(ranked[:, :, 1:] == ranked[:, :, :-1])
    if len(twice):
        token, layer, k = twice[0]
        yield (
            f"topk_ids[{start + token}, {layer}] lists expert {ranked[token, layer, k]} twice",
            "a token's experts are distinct: leave the token out",
        )
        return
    if weights is not None:
        wrong = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))
        if len(wrong):
            token, layer, k = wrong[0]
            yield (
                f"topk_weights[{start + token}, {layer}, {k}] is {weights[token, layer, k]}",
                "weights are finite and not negative",
            )
