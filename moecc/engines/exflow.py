"""ExFlow (YJHMITWEB/ExFlow): solutions as CSV `Expert,Node`, experts numbered through all layers, no replicas."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moecc.engines.files import read_text, wrong
from moecc.engines.slots import ModelPlacement, SlotTable
from moecc.files import write_atomic

HEADER = "Expert,Node"


def write(model: ModelPlacement, path: Path) -> None:
    """ "Node" is ExFlow's word for a GPU, counted through all nodes."""
    placement = model.placement
    if model.redundant:
        wrong(
            path,
            f"ExFlow has no replicas, the placement has {model.redundant} spare slots a layer",
            f"place with {placement.num_experts} slots in all",
        )
    device = np.arange(placement.slots) // placement.slots_per_device
    lines = [HEADER]
    for layer, row in enumerate(placement.physical_to_logical):
        where = device[np.argsort(row)]
        lines += [f"{layer * placement.num_experts + e},{d}" for e, d in enumerate(where.tolist())]
    write_atomic(path, "\n".join(lines) + "\n")


def read(path: Path) -> SlotTable:
    """The file does not say how many layers its experts belong to: one row of all, which `split_layers` cuts."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines or lines[0].replace(" ", "") != HEADER:
        wrong(f"{path}:1", "the header is missing", f"begin with {HEADER!r}")
    devices = {}
    for number, line in enumerate(lines[1:], 2):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 2 or not all(f.isascii() and f.isdigit() and len(f) <= 9 for f in fields):
            wrong(
                f"{path}:{number}", f"{line[:40]!r} is not 'expert,node'", "two integers of 0 or more a line"
            )
        if int(fields[0]) in devices:
            wrong(f"{path}:{number}", f"expert {fields[0]} is there twice", "ExFlow has no replicas")
        devices[int(fields[0])] = int(fields[1])
    if not devices or sorted(devices) != list(range(len(devices))):
        wrong(path, "experts are missing", "number them from 0 through all layers")
    where = np.array([devices[expert] for expert in range(len(devices))], np.int64)
    return SlotTable(rows=where[None], devices=int(where.max()) + 1)


def split_layers(table: SlotTable, path: Path, num_experts: int | None) -> SlotTable:
    """The solution with layers of num_experts experts, slots filled in rising order of experts."""
    where, devices = table.rows[0], table.devices or 1
    if num_experts is None or num_experts < 1:
        wrong(path, "ExFlow's file does not say how many experts a layer has", "give the number of experts")
    if len(where) % num_experts:
        wrong(
            path, f"{len(where)} experts do not fill layers of {num_experts}", "correct the number of experts"
        )
    layers = where.reshape(-1, num_experts)
    for layer, row in enumerate(layers):
        counts = np.bincount(row, minlength=devices)
        if counts.min() != counts.max():
            wrong(
                path,
                f"layer {layer}: devices hold {counts.min()} to {counts.max()} experts",
                "moecc gives every device as many slots",
            )
    rows = np.argsort(layers, axis=1, kind="stable")
    return SlotTable(rows=rows, num_experts=num_experts, devices=devices)


def launch_flags(model: ModelPlacement, path: Path) -> str:
    return f"# no flag: ExFlow's host program loads {path} when it places the experts"
