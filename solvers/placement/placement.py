"""A placement, the certificate of how good it is, and their file `placement.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError, Location

SCHEMA = "moecc.placement/1"
Status = Literal["optimal", "feasible", "time_limit", "infeasible"]
INTERRUPTED = "interrupted: the best placement until then"


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Which expert every slot holds.

    physical_to_logical: int32 [layers, slots], slots = devices * slots_per_device; slot p lives on device
    p // slots_per_device. Raises InputError where it is not a placement.
    """

    physical_to_logical: NDArray[np.int32]
    devices: int
    devices_per_node: int
    slots_per_device: int
    num_experts: int

    def __post_init__(self) -> None:
        _validate(self, "placement")

    @property
    def layers(self) -> int:
        return int(self.physical_to_logical.shape[0])

    @property
    def slots(self) -> int:
        return int(self.physical_to_logical.shape[1])

    def to_json(self) -> dict[str, Any]:
        """The fields of `placement.json` that describe the placement itself."""
        return {
            "schema": SCHEMA,
            "devices": self.devices,
            "devices_per_node": self.devices_per_node,
            "slots_per_device": self.slots_per_device,
            "num_experts": self.num_experts,
            "physical_to_logical_map": self.physical_to_logical.tolist(),
        }

    @staticmethod
    def from_json(text: str, *, where: str = "placement.json") -> Placement:
        """Read the text of a `placement.json`; `where` names the file in errors."""
        data = _parse(text, where)
        sizes: dict[str, int] = {}
        for field in ("devices", "devices_per_node", "slots_per_device", "num_experts"):
            value = data.get(field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{field} is {'missing' if value is None else repr(value)}",
                    where=where,
                    hint="it must be an integer of 1 or more",
                )
            sizes[field] = value
        rows = _rows(data.get("physical_to_logical_map"), where)
        placement = Placement.__new__(Placement)
        for name, content in {**sizes, "physical_to_logical": rows}.items():
            object.__setattr__(placement, name, content)
        _validate(placement, where)
        return placement


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Why the cap on the imbalance was tightened: asked, as the caller gave it for unseen sequences; gap, by how much
    sequences held out of the training exceeded it in trials; cap, asked - gap (at least 1), which the placement was
    solved for; expected, the imbalance on the training sequences plus the gap.
    """

    asked: float
    gap: float
    cap: float
    expected: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is known about a placement's objective.

    objective: as re-evaluated by `check`; bound: proven lower bound, None where none is useful;
    gap: (objective - bound) / objective. status: `optimal` proven; `feasible` the search ended by itself;
    `time_limit` the clock or an interrupt ended it; `infeasible` the placement is over max_imbalance, and the
    note says whether that is proven or only what the search reached. wall_s: seconds, all layers together.
    margin: None unless max_imbalance was meant for unseen sequences.
    """

    objective: float
    bound: float | None
    gap: float | None
    status: Status
    solver: str
    wall_s: float
    seed: int
    note: str = ""
    margin: Margin | None = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the search."""
        return INTERRUPTED in self.note


@dataclass(frozen=True, kw_only=True)
class Solution:
    placement: Placement
    certificate: Certificate

    def to_json(self, report: Mapping[str, Any] | None = None) -> str:
        """The text of `placement.json`, the certificate and a report of the caller's beside the placement."""
        data = self.placement.to_json() | {
            "certificate": asdict(self.certificate),
            "report": dict(report or {}),
        }
        return json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n"


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error.msg}",
            where=Location(where, error.lineno, error.colno),
            hint="write it with `moecc place` or Solution.to_json",
        ) from error
    except RecursionError as error:
        raise InputError("nested too deeply", where=where, hint=f"use the {SCHEMA} format") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"schema is {found!r}", where=where, hint=f"only {SCHEMA!r} can be read")
    return data


def _rows(rows: Any, where: str) -> NDArray[np.int32]:
    where = f"{where}: physical_to_logical_map"
    if not isinstance(rows, list) or not rows:
        raise InputError("it is missing or empty", where=where, hint="give one list of experts per layer")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(rows[0] if isinstance(rows[0], list) else []):
            raise InputError(
                "it is not a list as long as layer 0's",
                where=f"{where}[{layer}]",
                hint="list every slot's expert",
            )
        for slot, expert in enumerate(row):
            if not isinstance(expert, int) or isinstance(expert, bool) or not -(2**31) <= expert < 2**31:
                raise InputError(
                    f"{expert!r} is not an expert id", where=f"{where}[{layer}][{slot}]", hint="use integers"
                )
    return np.array(rows, np.int32)


def _validate(placement: Placement, where: str) -> None:
    table, experts = placement.physical_to_logical, placement.num_experts
    devices, width = placement.devices, placement.slots_per_device
    if devices < 1 or placement.devices_per_node < 1 or devices % placement.devices_per_node:
        raise InputError(
            f"{devices} devices do not fill nodes of {placement.devices_per_node}",
            where=where,
            hint="devices must be a multiple of devices_per_node",
        )
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != devices * width:
        raise InputError(
            f"physical_to_logical_map has shape {list(table.shape)}",
            where=where,
            hint=f"it must be [layers, {devices} devices x {width} slots]",
        )
    for layer, row in enumerate(table):
        at = f"{where}: physical_to_logical_map[{layer}]"
        outside = np.flatnonzero((row < 0) | (row >= experts))
        if len(outside):
            raise InputError(
                f"expert {row[outside[0]]} is outside [0, {experts})",
                where=f"{at}[{outside[0]}]",
                hint="use expert ids",
            )
        missing = np.flatnonzero(np.bincount(row, minlength=experts) == 0)
        if len(missing):
            raise InputError(f"expert {missing[0]} has no slot", where=at, hint="every expert needs one")
        held = np.sort(row.reshape(devices, width), axis=1)
        twice = np.argwhere(held[:, 1:] == held[:, :-1])
        if len(twice):
            device, column = (int(i) for i in twice[0])
            raise InputError(
                f"device {device} holds expert {held[device, column]} twice",
                where=at,
                hint="replicas of one expert belong on different devices",
            )
