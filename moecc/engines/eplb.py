"""DeepSeek EPLB: the three tensors that `eplb.rebalance_experts` returns, as .pt or .npz, layers with experts only.

physical_to_logical_map [L, P], logical_to_physical_map [L, E, X] padded with -1, expert_count [L, E].
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from moecc.engines.files import Ints, read_npz, read_torch, tensor_ints, wrong
from moecc.engines.slots import ModelPlacement, SlotTable
from moecc.files import write_atomic

NAMES = ("physical_to_logical_map", "logical_to_physical_map", "expert_count")


def tensors(rows: Ints, num_experts: int) -> tuple[Ints, Ints, Ints]:
    """The three tables of rows [L, P]; X is the most replicas that an expert has."""
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in rows])
    where = np.full((len(rows), num_experts, int(counts.max())), -1, np.int64)
    for layer, row in enumerate(rows):
        order = np.argsort(row, kind="stable")
        first = np.cumsum(counts[layer]) - counts[layer]
        where[layer, row[order], np.arange(len(row)) - first[row[order]]] = order
    return rows, where, counts


def write(model: ModelPlacement, path: Path) -> None:
    rows = model.placement.physical_to_logical.astype(np.int64)
    arrays = dict(zip(NAMES, tensors(rows, model.placement.num_experts), strict=True))
    stream = io.BytesIO()
    if path.suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, stream)
    elif path.suffix == ".npz":
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    else:
        wrong(path, "EPLB tensors are written as .pt or .npz", "end the name in .pt or .npz")
    write_atomic(path, stream.getvalue())


def read(path: Path) -> SlotTable:
    data = read_npz(path, NAMES) if path.suffix == ".npz" else read_torch(path)
    rows, where, counts = (
        tensor_ints(path, name, data.get(name), (rank,)) for name, rank in zip(NAMES, (2, 3, 2), strict=True)
    )
    experts = counts.shape[1]
    if len(rows) != len(counts) or rows.min() < 0 or rows.max() >= experts:
        wrong(
            path, f"{NAMES[0]} does not fit expert_count {list(counts.shape)}", "give tensors of one result"
        )
    _, want_where, want_counts = tensors(rows, experts)
    if not np.array_equal(counts, want_counts):
        layer, expert = np.argwhere(counts != want_counts)[0]
        wrong(
            f"{path}: expert_count[{layer}][{expert}]",
            f"it is {counts[layer, expert]}, the map has {want_counts[layer, expert]} replicas",
            "give tensors of one result",
        )
    if where.shape[:2] != counts.shape or not _same_slots(where, want_where):
        wrong(f"{path}: {NAMES[1]}", f"it is not the inverse of {NAMES[0]}", "give tensors of one result")
    return SlotTable(rows=rows, num_experts=experts)


def _same_slots(found: Ints, wanted: Ints) -> bool:
    """Equal but for the order of replicas and the width of the padding."""
    width = max(found.shape[2], wanted.shape[2])
    mine, other = (
        np.sort(np.pad(table, ((0, 0), (0, 0), (0, width - table.shape[2])), constant_values=-1), axis=2)
        for table in (found, wanted)
    )
    return bool(np.array_equal(mine, other))


def launch_flags(model: ModelPlacement, path: Path) -> str:
    return f"# no flag: load {path} where the program calls eplb.rebalance_experts"
