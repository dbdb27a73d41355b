"""Dumps of engines as routing traces: what a file is, its content says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moecc.engines import recorder, responses
from moecc.engines.counts import STATS_RECORD
from moecc.engines.files import NUMPY_MAGIC, ZIP_MAGIC, Ints, archive_names, head, read_torch, wrong
from moecc.errors import InputError
from moecc.frontend.checks import MAX_EXPERTS
from moecc.frontend.trace import load_trace
from moecc.solvers.routing import Routing

COUNTS_ONLY = (
    "it holds counts of experts, not the experts of tokens: a trace cannot be made of it",
    "place for balance from the counts (moecc.engines.read_counts); for a trace record per token",
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """notes: what was left out or taken for granted, one sentence each."""

    routing: Routing
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One file. topk_ids: [tokens, layers, k], -1 for none; sequences: [tokens]; num_experts: None if not known."""

    path: Path
    topk_ids: Ints
    sequences: Ints
    num_experts: int | None


def convert(paths: Sequence[Path], *, num_experts: int | None = None, name: str = "") -> Conversion:
    """The tokens of all files as one workload; sequences of different files are different.

    Layers and columns in which no token has an expert are left out (dense layers, top_k below the recorder's width),
    and so are tokens that have not all of their experts (padding).
    Errors: InputError for what is no dump, is damaged, holds only counts, or does not fit the other files.
    """
    if not paths:
        raise InputError("there are no files", where="convert", hint="name at least one dump")
    parts = [_compact(_read(Path(path))) for path in paths]
    notes = [note for _, found in parts for note in found]
    shapes = {part.topk_ids.shape[1:] for part, _ in parts}
    for part, _ in parts:
        if part.topk_ids.shape[1:] != parts[0][0].topk_ids.shape[1:]:
            wrong(
                part.path,
                f"layers and top_k are {part.topk_ids.shape[1:]} of {sorted(shapes)}",
                "one model a trace",
            )
    ids = np.concatenate([part.topk_ids for part, _ in parts])
    experts = _experts([part for part, _ in parts], int(ids.max()) + 1, num_experts, notes)
    return Conversion(
        routing=Routing(
            name=name or Path(paths[0]).stem,
            topk_ids=ids.astype(np.int16),
            num_experts=experts,
            sequence_ids=_numbered([part.sequences for part, _ in parts]),
        ),
        notes=tuple(dict.fromkeys(notes)),
    )


def _read(path: Path) -> _Part:
    start = head(path)
    if start.startswith(ZIP_MAGIC):
        names = archive_names(path)
        if any(name.endswith("data.pkl") for name in names):
            return _from_recorder(path)
        if "topk_ids.npy" in names:
            routing = load_trace(path)
            return _Part(
                path=path,
                topk_ids=routing.topk_ids.astype(np.int64),
                sequences=routing.sequence_ids.astype(np.int64),
                num_experts=routing.num_experts,
            )
    if STATS_RECORD.encode() in start or b'"logical_count"' in start:
        wrong(path, *COUNTS_ONLY)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    known = start.startswith(NUMPY_MAGIC) or text.startswith(
        (b"{", b"[", b'"', responses.BASE64_MAGIC.encode())
    )
    if not known:
        wrong(
            path,
            "it is no dump that is known",
            "give SGLang per_token dumps (.pt), vLLM routed experts (.npy, base64, JSON) or traces (.npz)",
        )
    found = responses.sequences(path, start)
    if len({part.shape[1:] for part in found}) > 1:
        wrong(path, "its sequences have different layers or top_k", "one model a trace")
    return _Part(
        path=path,
        topk_ids=np.concatenate(found),
        sequences=np.repeat(np.arange(len(found)), [len(part) for part in found]),
        num_experts=None,
    )


def _from_recorder(path: Path) -> _Part:
    data = read_torch(path)
    kind = recorder.kind(data)
    if kind is None:
        wrong(path, "neither 'logical_count' nor 'records' is in it", "give a dump of SGLang's recorder")
    if kind != "per_token":
        what, hint = COUNTS_ONLY
        wrong(path, f"a {kind} dump: {what}", f"{hint} (--expert-distribution-recorder-mode per_token)")
    found = recorder.tokens(data, path)
    return _Part(path=path, topk_ids=found.topk_ids, sequences=found.sequences, num_experts=found.num_experts)


def _compact(part: _Part) -> tuple[_Part, list[str]]:
    """Without layers, columns and tokens that hold nothing."""
    ids, notes = part.topk_ids, []
    if ids.min() < -1 or ids.max() >= 2**15:
        wrong(part.path, f"expert ids reach from {ids.min()} to {ids.max()}", "ids are -1 or in [0, 32768)")
    # vLLM leaves the rows of dense layers zero: with two experts a token that is no routing.
    blank = (ids == -1).all(axis=(0, 2)) | ((ids == 0).all(axis=(0, 2)) & (ids.shape[2] > 1))
    if blank.all():
        wrong(part.path, "no token has an expert in any layer", "record while the engine serves requests")
    if blank.any():
        notes.append(f"layers without experts left out: {', '.join(map(str, np.flatnonzero(blank)))}")
        ids = ids[:, ~blank]
    ids = ids[:, :, ~(ids == -1).all(axis=(0, 1))]
    ranked = np.sort(ids, axis=2)
    whole = ~((ids < 0).any(axis=(1, 2)) | (ranked[:, :, 1:] == ranked[:, :, :-1]).any(axis=(1, 2)))
    if not whole.any():
        wrong(part.path, "no token has distinct experts in every layer", "record top-k ids of every layer")
    if not whole.all():
        notes.append(f"{(~whole).sum()} tokens without all of their experts left out (padding)")
    kept = _Part(
        path=part.path, topk_ids=ids[whole], sequences=part.sequences[whole], num_experts=part.num_experts
    )
    return kept, notes


def _experts(parts: Sequence[_Part], seen: int, given: int | None, notes: list[str]) -> int:
    known = {part.num_experts for part in parts if part.num_experts is not None}
    if given is not None:
        known.add(given)
    if len(known) > 1:
        raise InputError(
            f"the number of experts is {' and '.join(map(str, sorted(known)))}",
            where=str(parts[0].path),
            hint="give dumps of one model, and its number of experts",
        )
    experts = known.pop() if known else seen
    if not seen <= experts <= MAX_EXPERTS:
        raise InputError(
            f"expert {seen - 1} is chosen, the model has {experts} experts",
            where=str(parts[0].path),
            hint=f"the number of experts must be in [{seen}, {MAX_EXPERTS}]",
        )
    if given is None and all(part.num_experts is None for part in parts):
        notes.append(
            f"the dump does not say how many experts there are: {experts}, one more than the highest id, is taken"
        )
    return experts


def _numbered(sequences: Sequence[Ints]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Sequence ids from 0 through all files."""
    numbered, first = [], 0
    for ids in sequences:
        unique, index = np.unique(ids, return_inverse=True)
        numbered.append(index.ravel() + first)
        first += len(unique)
    return np.concatenate(numbered).astype(np.int32)
