"""What every placement file says in its own way: the expert of every slot of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines.files import Ints, wrong
from moecc.errors import InputError
from moecc.solvers.placement.placement import Placement

MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelPlacement:
    """A placement in the model that it is for: moe_layers names the model's layer of every row.

    Raises InputError where they do not fit together.
    """

    placement: Placement
    layers_total: int
    moe_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        layers, where = self.moe_layers, "layers"
        if len(layers) != self.placement.layers:
            raise InputError(
                f"{len(layers)} MoE layers are named, the placement has {self.placement.layers}",
                where=where,
                hint="name the model's layer of every row of the placement",
            )
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < self.layers_total:
            raise InputError(
                f"MoE layers {list(layers)} are not rising within [0, {self.layers_total})",
                where=where,
                hint="give layers_total and the layers as the model's configuration has them",
            )

    @property
    def redundant(self) -> int:
        """Slots of a layer beyond one an expert."""
        return self.placement.slots - self.placement.num_experts

    def all_layers(self) -> Ints:
        """[layers_total, slots]: layers without experts as engines number them, slot p -> p modulo experts."""
        rows = np.tile(np.arange(self.placement.slots) % self.placement.num_experts, (self.layers_total, 1))
        rows[list(self.moe_layers)] = self.placement.physical_to_logical
        return rows


@dataclass(frozen=True, kw_only=True)
class SlotTable:
    """A placement as a file has it. rows: [layers, slots]; layers: the model's layer of every row, None where the
    file counts only layers with experts; num_experts, devices: None where the file does not say."""

    rows: Ints
    layers: tuple[int, ...] | None = None
    num_experts: int | None = None
    devices: int | None = None


def why_impossible(rows: Ints, num_experts: int, devices: int) -> tuple[str, str] | None:
    """(reason, hint) why no engine can load this table, or None; rows: [layers, slots].

    Engines give every device the same number of slots and address an expert on a device by its number alone.
    """
    layers, slots = rows.shape
    if devices < 1 or slots % devices:
        return f"{slots} slots do not divide over {devices} devices", "use as many slots on every device"
    outside = np.argwhere((rows < 0) | (rows >= num_experts))
    if len(outside):
        layer, slot = outside[0]
        found = f"layer {layer}, slot {slot} holds expert {rows[layer, slot]}"
        return found + f", not in [0, {num_experts})", "correct the experts"
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in rows])
    if (counts == 0).any():
        layer, expert = np.argwhere(counts == 0)[0]
        return f"layer {layer}: expert {expert} has no slot", "every expert needs one"
    held = np.sort(rows.reshape(layers, devices, -1), axis=2)
    twice = np.argwhere(held[:, :, 1:] == held[:, :, :-1])
    if len(twice):
        layer, device, column = twice[0]
        return (
            f"layer {layer}: device {device} holds expert {held[layer, device, column]} twice",
            "two replicas of an expert on one device share no load: move one",
        )
    return None


def as_placement(
    table: SlotTable,
    path: Path,
    *,
    devices: int | None,
    devices_per_node: int | None,
    num_experts: int | None,
    moe_layers: Sequence[int] | None,
) -> Placement:
    """The placement in a table. Errors: InputError where the file and the arguments disagree or too little is known."""
    count = table.devices or devices
    if count is None:
        wrong(path, "the file does not say how many devices it is for", "give the number of devices")
    if None not in (table.devices, devices) and table.devices != devices:
        wrong(path, f"it is for {table.devices} devices, not {devices}", "give the file of this cluster")
    rows = _chosen_layers(table, path, moe_layers)
    experts = table.num_experts or num_experts or int(rows.max()) + 1
    if num_experts is not None and experts != num_experts:
        wrong(
            path, f"it is for {experts} experts, the model has {num_experts}", "give the file of this model"
        )
    if problem := why_impossible(rows, experts, count):
        wrong(path, *problem)
    per_node = devices_per_node or count
    if count % per_node:
        wrong(path, f"{count} devices do not fill nodes of {per_node}", "correct devices_per_node")
    return Placement(
        physical_to_logical=rows.astype(np.int32),
        devices=count,
        devices_per_node=per_node,
        slots_per_device=rows.shape[1] // count,
        num_experts=experts,
    )


def _chosen_layers(table: SlotTable, path: Path, moe_layers: Sequence[int] | None) -> Ints:
    if moe_layers is None:
        return table.rows
    if table.layers is None:
        if len(moe_layers) != len(table.rows):
            wrong(
                path,
                f"it has {len(table.rows)} layers, the model {len(moe_layers)} with experts",
                "give the file of this model",
            )
        return table.rows
    at = {layer: row for row, layer in enumerate(table.layers)}
    missing = [layer for layer in moe_layers if layer not in at]
    if missing:
        wrong(path, f"layer {missing[0]} is missing", "the file must have every layer with experts")
    return np.asarray(table.rows[[at[layer] for layer in moe_layers]])


def require_json_name(path: Path, engine: str) -> None:
    if path.suffix != ".json":
        wrong(path, f"{engine} reads no file of this name", "end the name in .json")


def int_list(value: Any, where: str, *, length: int | None = None, high: int = 2**31) -> list[int]:
    """A list of integers in [0, high). Errors: InputError naming the entry."""
    if not isinstance(value, list) or not value:
        wrong(where, "it is not a list of experts", "list the expert of every slot")
    if length is not None and len(value) != length:
        wrong(where, f"it has {len(value)} entries, not {length}", "every list of a file has the same length")
    for index, entry in enumerate(value):
        if not isinstance(entry, int) or isinstance(entry, bool) or not 0 <= entry < high:
            wrong(f"{where}[{index}]", f"{entry!r:.40} is not an expert id", "use integers of 0 or more")
    return value


def int_rows(value: Any, where: str) -> Ints:
    """A list of equally long lists of experts as [layers, slots]."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        wrong(where, "it is not a list of layers", "one list of experts a layer")
    first = int_list(value[0], f"{where}[0]")
    return np.array(
        [int_list(row, f"{where}[{layer}]", length=len(first)) for layer, row in enumerate(value)], np.int64
    )


def assignment_rows(value: Any, where: str, slots: int) -> dict[int, list[int]]:
    """{layer: experts} with layers as integers or texts of them, in rising order."""
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_LAYERS:
        wrong(where, "it is not a table from layers to experts", "write {layer: [expert of every slot]}")
    rows: dict[int, list[int]] = {}
    for key, row in value.items():
        text = str(key)
        if (
            isinstance(key, bool)
            or not (text.isascii() and text.isdigit())
            or len(text) > 6
            or int(text) in rows
        ):
            wrong(where, f"{text[:40]!r} is not a layer, or there twice", "number the layers from 0")
        rows[int(text)] = int_list(row, f"{where}[{text}]", length=slots)
    return dict(sorted(rows.items()))
