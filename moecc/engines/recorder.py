"""Dumps of SGLang's expert distribution recorder, `.pt`, read only.

stat: {rank, logical_count [(steps,) L, E], average_utilization_rate_over_window};
per_pass and per_token: {records: [{forward_pass_id, rank, gatherer_key, global_physical_count [L, P], and for
per_token topk_ids_of_layer [L, T, 8], positions, extend_seq_lens, ...}], last_physical_to_logical_map [L, P]}.
Expert ids of tokens are those of slots; absent ones, dense layers and columns past top_k hold -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines.files import Ints, tensor_ints, wrong

MAP = "last_physical_to_logical_map"


@dataclass(frozen=True, kw_only=True)
class RecordedTokens:
    """topk_ids: [tokens, layers, k] of all layers, -1 where there is none; sequences: [tokens]; num_experts."""

    topk_ids: Ints
    sequences: Ints
    num_experts: int


def kind(data: Mapping[str, Any]) -> str | None:
    """`stat`, `per_pass` or `per_token`; None if it is no dump."""
    if "logical_count" in data:
        return "stat"
    records = data.get("records")
    if not isinstance(records, list):
        return None
    return (
        "per_token"
        if any(isinstance(r, Mapping) and "topk_ids_of_layer" in r for r in records)
        else "per_pass"
    )


def counts(data: Mapping[str, Any], path: Path) -> Ints:
    """[layers, experts]: how many tokens chose every expert, summed over steps; layers without experts are zero."""
    if kind(data) == "stat":
        count = tensor_ints(path, "logical_count", data["logical_count"], (2, 3))
        count = count.sum(axis=0) if count.ndim == 3 else count
    else:
        slots = _slot_map(data, path)
        count = np.zeros((len(slots), int(slots.max()) + 1), np.int64)
        for index, record in enumerate(_records(data, path)):
            name = f"records[{index}].global_physical_count"
            physical = tensor_ints(path, name, record.get("global_physical_count"), (2,))
            if physical.shape != slots.shape:
                wrong(
                    f"{path}: {name}",
                    f"it is {list(physical.shape)}, the map {list(slots.shape)}",
                    "record again",
                )
            np.add.at(count, (np.arange(len(slots))[:, None], slots), physical)
    if count.min() < 0 or not count.any():
        wrong(path, "counts are negative or all zero", "record while the engine serves requests")
    return count


def tokens(data: Mapping[str, Any], path: Path) -> RecordedTokens:
    """The tokens of all forward passes of a per_token dump, in order."""
    slots = _slot_map(data, path)
    every = np.append(slots, np.full((len(slots), 1), -1), axis=1)
    chains, ids = Chains(), []
    for index, record in enumerate(_records(data, path)):
        name = f"records[{index}].topk_ids_of_layer"
        passed = tensor_ints(path, name, record.get("topk_ids_of_layer"), (3,))
        if len(passed) != len(slots) or passed.min() < -1 or passed.max() >= slots.shape[1]:
            wrong(f"{path}: {name}", f"it does not fit the map of {list(slots.shape)} slots", "record again")
        logical = every[np.arange(len(slots))[:, None, None], passed]
        ids.append(logical.transpose(1, 0, 2))
        chains.add(record, passed.shape[1], f"{path}: records[{index}]")
    width = {part.shape[2] for part in ids}
    if len(width) != 1:
        wrong(path, f"tokens have {sorted(width)} columns", "give one dump of one engine")
    return RecordedTokens(
        topk_ids=np.concatenate(ids),
        sequences=np.array(chains.of_token, np.int64),
        num_experts=int(slots.max()) + 1,
    )


class Chains:
    """Which sequence a token belongs to, as far as positions tell: the dumps name no requests.

    A prompt's part is one sequence; whatever begins at position p > 0 continues the oldest sequence that stands at
    p - 1, or is a new one.
    """

    def __init__(self) -> None:
        self.of_token: list[int] = []
        self.count = 0
        self.at: dict[int, list[int]] = {}

    def add(self, record: Mapping[str, Any], tokens: int, where: str) -> None:
        positions = _plain_ints(record.get("positions"), tokens, f"{where}.positions")
        lengths = record.get("extend_seq_lens")
        if lengths is None or positions is None:
            lengths = [1] * tokens if positions is not None else [tokens]
        lengths = _plain_ints(lengths, None, f"{where}.extend_seq_lens") or []
        if sum(lengths) != tokens or min(lengths, default=1) < 0:
            lengths = [1] * tokens
        begin = 0
        for length in lengths:
            if length:
                first = positions[begin] if positions else 0
                sequence = self._continued(first)
                self.of_token += [sequence] * length
                last = positions[begin + length - 1] if positions else length - 1
                self.at.setdefault(last, []).append(sequence)
            begin += length

    def _continued(self, first: int) -> int:
        if first > 0 and self.at.get(first - 1):
            return self.at[first - 1].pop(0)
        self.count += 1
        return self.count - 1


def _plain_ints(value: Any, length: int | None, where: str) -> list[int] | None:
    """A list of integers; None if there is none."""
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or not all(isinstance(v, int) and abs(v) < 2**31 for v in value):
        wrong(where, "it is not a list of integers", "record again")
    if length is not None and len(value) != length:
        wrong(where, f"it has {len(value)} entries for {length} tokens", "record again")
    return list(value)


def _records(data: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    records = data.get("records")
    if not isinstance(records, list) or not records:
        wrong(path, "there are no records", "record while the engine serves requests")
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            wrong(f"{path}: records[{index}]", f"it is a {type(record).__name__}", "record again")
    return records


def _slot_map(data: Mapping[str, Any], path: Path) -> Ints:
    slots = tensor_ints(path, MAP, data.get(MAP), (2,))
    if slots.min() < 0 or slots.max() >= slots.shape[1]:
        wrong(f"{path}: {MAP}", "an expert is out of range", "record again")
    return slots
