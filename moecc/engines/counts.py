"""How many tokens chose every expert, from the dumps of engines that hold counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines import recorder
from moecc.engines.files import (
    NUMPY_MAGIC,
    ZIP_MAGIC,
    Ints,
    archive_names,
    head,
    parse_json,
    read_json_lines,
    read_npy,
    read_npz,
    read_text,
    read_torch,
    tensor_ints,
    wrong,
)

STATS_RECORD = "eplb_load_stats"


def read_counts(path: Path) -> Ints:
    """[layers, experts] int64, summed over steps, layers as the file has them: those without experts are zero.

    Reads SGLang's recorder dumps (.pt, and JSON with logical_count), vLLM's EPLB statistics (JSON lines of
    eplb_load_stats, loads of slots summed by p2l_map), and plain arrays (.npy, .npz with `counts`).
    Errors: InputError where the file is none of these, or damaged.
    """
    path = Path(path)
    start = head(path)
    if start.startswith(ZIP_MAGIC):
        if any(name.endswith("data.pkl") for name in archive_names(path)):
            data = read_torch(path)
            if recorder.kind(data) is None:
                wrong(
                    path, "neither 'logical_count' nor 'records' is in it", "give a dump of SGLang's recorder"
                )
            return recorder.counts(data, path)
        return _checked(path, tensor_ints(path, "counts", read_npz(path, ["counts"]).get("counts"), (2, 3)))
    if start.startswith(NUMPY_MAGIC):
        return _checked(path, tensor_ints(path, "array", read_npy(path), (2, 3)))
    if STATS_RECORD.encode() in start or b"record_type" in start:
        return _from_stats(path)
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        wrong(path, "it is no file of counts", "give a recorder dump, EPLB statistics or an array")
    data = parse_json(path, read_text(path))
    value = data.get("logical_count") if isinstance(data, dict) else None
    return _checked(path, tensor_ints(path, "logical_count", value, (2, 3)))


def _checked(path: Path, counts: Ints) -> Ints:
    counts = counts.sum(axis=0) if counts.ndim == 3 else counts
    if counts.min() < 0 or not counts.any():
        wrong(path, "counts are negative or all zero", "record while the engine serves requests")
    return counts


def _from_stats(path: Path) -> Ints:
    total: Ints | None = None
    for line, record in read_json_lines(path):
        if record.get("record_type") != STATS_RECORD:
            continue
        counts = _of_record(Path(f"{path}:{line}"), record)
        if total is not None and counts.shape != total.shape:
            wrong(
                f"{path}:{line}",
                f"it counts {list(counts.shape)}, lines before {list(total.shape)}",
                "one model a file",
            )
        total = counts if total is None else total + counts
    if total is None:
        wrong(path, f"there is no record of type {STATS_RECORD}", "serve with expert_load_stats_path set")
    return _checked(path, total)


def _of_record(where: Path, record: dict[str, Any]) -> Ints:
    load = tensor_ints(where, "expert_load", record.get("expert_load"), (2,))
    slots = tensor_ints(where, "p2l_map", record.get("p2l_map"), (2,))
    if load.shape != slots.shape or slots.min() < 0 or slots.max() >= slots.shape[1]:
        wrong(
            where, f"expert_load {list(load.shape)} does not fit p2l_map {list(slots.shape)}", "record again"
        )
    counts = np.zeros((len(load), int(slots.max()) + 1), np.int64)
    np.add.at(counts, (np.arange(len(load))[:, None], slots), load)
    return counts
