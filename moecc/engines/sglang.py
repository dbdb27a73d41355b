"""SGLang: `--init-expert-location FILE`, JSON with the one key physical_to_logical_map [all layers][slots]."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from moecc.engines.files import read_json_object, wrong
from moecc.engines.slots import ModelPlacement, SlotTable, int_rows, require_json_name
from moecc.files import write_atomic

KEY = "physical_to_logical_map"


def write(model: ModelPlacement, path: Path) -> None:
    """SGLang passes the file's keys on as arguments, so another key breaks its loader; dense layers are included.

    It takes a name that does not end in .json for the JSON itself.
    """
    require_json_name(path, "SGLang")
    write_atomic(path, json.dumps({KEY: model.all_layers().tolist()}, separators=(",", ":")) + "\n")


def read(path: Path) -> SlotTable:
    data = read_json_object(path)
    if KEY not in data:
        wrong(path, f"'{KEY}' is missing", "a file of counts alone holds no placement")
    if extra := sorted(data.keys() - {KEY}):
        wrong(path, f"key {extra[0][:40]!r} breaks SGLang's loader", f"keep {KEY} alone")
    rows = int_rows(data[KEY], f"{path}: {KEY}")
    return SlotTable(rows=rows, layers=tuple(range(len(rows))))


def launch_flags(model: ModelPlacement, path: Path) -> str:
    devices, nodes = model.placement.devices, model.placement.devices // model.placement.devices_per_node
    flags = ["--tp-size", str(devices), "--ep-size", str(devices)]
    if nodes > 1:
        flags += ["--nnodes", str(nodes)]
    if model.redundant:
        flags += ["--ep-num-redundant-experts", str(model.redundant)]
    return shlex.join([*flags, "--ep-dispatch-algorithm", "static", "--init-expert-location", str(path)])
