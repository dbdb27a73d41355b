"""vllm-ascend: `expert_map.json`, the experts of every device of every layer with experts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines.files import read_json_object, wrong
from moecc.engines.slots import MAX_LAYERS, ModelPlacement, SlotTable, int_list, require_json_name
from moecc.files import write_atomic


def write(model: ModelPlacement, path: Path) -> None:
    require_json_name(path, "vllm-ascend")
    placement = model.placement
    held = placement.physical_to_logical.reshape(placement.layers, placement.devices, -1).tolist()
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.devices,
            "device_list": [{"device_id": d, "device_expert": experts} for d, experts in enumerate(row)],
        }
        for layer, row in enumerate(held)
    ]
    text = json.dumps({"moe_layer_count": placement.layers, "layer_list": layers}, separators=(",", ":"))
    write_atomic(path, text + "\n")


def read(path: Path) -> SlotTable:
    data = read_json_object(path)
    layers = data.get("layer_list")
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        wrong(path, "'layer_list' is not a list of layers", "one entry a layer with experts")
    if data.get("moe_layer_count") != len(layers):
        count = str(data.get("moe_layer_count"))[:20]
        wrong(path, f"moe_layer_count is {count}, layer_list has {len(layers)}", "correct the count")
    rows = [_devices(layer, f"{path}: layer_list[{index}]", index) for index, layer in enumerate(layers)]
    shapes = [[len(experts) for experts in row] for row in rows]
    for index, shape in enumerate(shapes):
        if shape != shapes[0] or len(set(shape)) > 1:
            wrong(
                f"{path}: layer_list[{index}]",
                "its devices have different numbers of experts, or others than layer 0",
                "vllm-ascend reads one table: as many experts on every device",
            )
    return SlotTable(rows=np.array(rows, np.int64).reshape(len(rows), -1), devices=len(rows[0]))


def _devices(layer: Any, where: str, index: int) -> list[list[int]]:
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        wrong(where, "'device_list' is not a list of devices", "one entry a device")
    if layer.get("device_count") != len(devices) or layer.get("layer_id") != index:
        wrong(where, "layer_id or device_count does not fit its place", "number layers and devices from 0")
    rows = []
    for number, device in enumerate(devices):
        at = f"{where}.device_list[{number}]"
        if not isinstance(device, dict) or device.get("device_id") != number:
            wrong(at, "device_id does not fit its place", "number the devices from 0")
        rows.append(int_list(device.get("device_expert"), f"{at}.device_expert"))
    return rows


def launch_flags(model: ModelPlacement, path: Path) -> str:
    config: dict[str, Any] = {"expert_map_path": str(path)}
    if model.redundant:
        config["num_redundant_experts"] = model.redundant
    flags = ["--tensor-parallel-size", str(model.placement.devices), "--enable-expert-parallel"]
    return shlex.join([*flags, "--additional-config", json.dumps({"eplb_config": config})])
