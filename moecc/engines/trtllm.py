"""TensorRT-LLM: the YAML of `moe_config.load_balancer`, with the model's own layer numbers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines.files import read_text, wrong
from moecc.engines.slots import ModelPlacement, SlotTable, assignment_rows
from moecc.errors import InputError, Location
from moecc.files import write_atomic

KEYS = ("num_slots", "layer_updates_per_iter", "initial_global_assignments")


def write(model: ModelPlacement, path: Path) -> None:
    """layer_updates_per_iter 0: the placement stays as it is (an offline load balancer)."""
    lines = ["initial_global_assignments:"]
    for layer, row in zip(model.moe_layers, model.placement.physical_to_logical.tolist(), strict=True):
        lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
    lines += [f"num_slots: {model.placement.slots}", "layer_updates_per_iter: 0", ""]
    write_atomic(path, "\n".join(lines))


def read(path: Path) -> SlotTable:
    data = _load(path)
    if not isinstance(data, dict):
        wrong(path, f"it holds a {type(data).__name__}, not a table", f"write {', '.join(KEYS)}")
    if unknown := [str(key)[:40] for key in data if key not in KEYS]:
        wrong(path, f"unknown key {unknown[0]!r}", f"TensorRT-LLM knows {', '.join(KEYS)}")
    slots, updates = data.get("num_slots"), data.get("layer_updates_per_iter", 0)
    for name, size, least in (("num_slots", slots, 1), ("layer_updates_per_iter", updates, 0)):
        if not isinstance(size, int) or isinstance(size, bool) or not least <= size < 2**31:
            wrong(path, f"{name} is {str(size)[:20]!r}", f"it must be an integer of {least} or more")
    rows = assignment_rows(
        data.get("initial_global_assignments"), f"{path}: initial_global_assignments", int(slots or 0)
    )
    return SlotTable(rows=np.array(list(rows.values()), np.int64), layers=tuple(rows))


def _load(path: Path) -> Any:
    import yaml

    text = read_text(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = Location(str(path), mark.line + 1, mark.column + 1) if mark else str(path)
        raise InputError(
            f"not valid YAML: {error.problem}", where=where, hint="write the file again"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError, LookupError) as error:
        wrong(path, f"not usable YAML ({' '.join(str(error).split())[:100]})", "write the file again")


def launch_flags(model: ModelPlacement, path: Path) -> str:
    devices = str(model.placement.devices)
    flags = shlex.join(["--tp_size", devices, "--ep_size", devices, "--extra_llm_api_options", "extra.yaml"])
    return f"{flags}  # extra.yaml: moe_config: {{load_balancer: {path}}}"
