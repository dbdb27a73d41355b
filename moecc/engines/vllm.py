"""vLLM: the initial mapping of `--eplb-config`, JSON lines with one record eplb_initial_mapping.

The layout is that of vLLM's pull request 41141 (offline EPLB): layers are counted among those with experts.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np

from moecc.engines.files import read_json_lines, wrong
from moecc.engines.slots import ModelPlacement, SlotTable, assignment_rows
from moecc.files import write_atomic

RECORD, VERSION = "eplb_initial_mapping", 1


def write(model: ModelPlacement, path: Path) -> None:
    rows = model.placement.physical_to_logical.tolist()
    record = {
        "record_type": RECORD,
        "version": VERSION,
        "num_redundant_experts": model.redundant,
        "num_slots": model.placement.slots,
        "initial_global_assignments": {str(layer): row for layer, row in enumerate(rows)},
    }
    write_atomic(path, json.dumps(record) + "\n")


def read(path: Path) -> SlotTable:
    found = [(line, record) for line, record in read_json_lines(path) if record.get("record_type") == RECORD]
    if len(found) != 1:
        wrong(path, f"it has {len(found)} records of type {RECORD}", "a mapping has one")
    line, record = found[0]
    where = f"{path}:{line}"
    if record.get("version") != VERSION:
        wrong(
            where,
            f"version {str(record.get('version'))[:20]!r} is unknown",
            f"only version {VERSION} is read",
        )
    sizes = {name: record.get(name) for name in ("num_slots", "num_redundant_experts")}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**31:
            wrong(where, f"{name} is {str(size)[:20]!r}", "it must be an integer of 0 or more")
    slots, redundant = int(sizes["num_slots"] or 0), int(sizes["num_redundant_experts"] or 0)
    if redundant >= slots:
        wrong(where, f"{redundant} redundant experts of {slots} slots leave no expert", "correct the sizes")
    at = f"{where}: initial_global_assignments"
    rows = assignment_rows(record.get("initial_global_assignments"), at, slots)
    if list(rows) != list(range(len(rows))):
        wrong(at, "layers are missing", "vLLM counts the layers with experts from 0")
    return SlotTable(rows=np.array(list(rows.values()), np.int64), num_experts=slots - redundant)


def launch_flags(model: ModelPlacement, path: Path) -> str:
    config = {"num_redundant_experts": model.redundant, "initial_mapping_path": str(path)}
    flags = [
        "--data-parallel-size",
        str(model.placement.devices),
        "--enable-expert-parallel",
        "--enable-eplb",
    ]
    return shlex.join([*flags, "--eplb-config", json.dumps(config)])
