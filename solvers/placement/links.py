"""What a byte costs from device to device: tiers, a measured matrix, or the links that `nvidia-smi topo -m` lists."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError, Location

Floats = NDArray[np.float64]

SAME_DEVICE, SAME_NODE, OTHER_NODE = "same device", "same node", "other node"
TIER_COSTS = (0.0, 1.0, 3.2)
"""Relative cost of a byte within a device, within a node and between nodes. NVLink carries 3.2 times the bytes per
second of one InfiniBand card: 160 and 50 GB/s (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.2.2)."""

NVLINK_GB_S, PCIE_GB_S = 25.0, 32.0
"""Per direction: one NVLink of generations 2 to 4, and PCIe 4.0 x16 (NVIDIA A100 whitepaper)."""
PCIE = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""From near to far, as the legend of `nvidia-smi topo -m` orders them."""
MAX_DEVICES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """tiers: names, nearest first, tiers[0] the device itself. tier: int64 [devices, devices], indices into `tiers`;
    cost: float64 [devices, devices], of one byte from row to column, in us or any unit; the diagonal is free.

    Consecutive devices form nodes of PlacementProblem.devices_per_node: a token crosses to another node once, to
    the device of its own local rank, and is forwarded from there (DeepEP). Raises InputError where that is no matrix.
    """

    tiers: tuple[str, ...]
    tier: NDArray[np.int64]
    cost: Floats

    def __post_init__(self) -> None:
        _validate(self, "links")

    @property
    def devices(self) -> int:
        return len(self.cost)

    @staticmethod
    def by_node(devices: int, devices_per_node: int, costs: tuple[float, float, float] = TIER_COSTS) -> Links:
        """Three tiers: the device itself, its node, other nodes."""
        device = np.arange(devices)
        node = device // devices_per_node
        tier = np.where(device[:, None] == device, 0, np.where(node[:, None] == node, 1, 2))
        return Links(
            tiers=(SAME_DEVICE, SAME_NODE, OTHER_NODE),
            tier=tier.astype(np.int64),
            cost=np.array(costs, np.float64)[tier],
        )

    @staticmethod
    def from_matrix(cost: Floats, devices_per_node: int) -> Links:
        """A measured matrix, [devices, devices], us per byte or relative; tiers by node."""
        cost = np.asarray(cost, np.float64)
        tiers = Links.by_node(len(cost), devices_per_node)
        return Links(tiers=tiers.tiers, tier=tiers.tier, cost=cost)

    @staticmethod
    def from_json(text: str, devices_per_node: int, *, where: str = "links.json") -> Links:
        """A list of rows, or an object with the key `cost` that holds it."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            at = (
                Location(where, error.lineno, error.colno)
                if isinstance(error, json.JSONDecodeError)
                else where
            )
            raise InputError("not valid JSON", where=at, hint="write the matrix as a list of rows") from error
        rows = data.get("cost") if isinstance(data, dict) else data
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise InputError(
                "there is no matrix", where=where, hint="write it as a list of rows, or under 'cost'"
            )
        places = [[f"{where}: row {i}, column {j}" for j in range(len(row))] for i, row in enumerate(rows)]
        return Links.from_matrix(_matrix(rows, places, where), devices_per_node)

    @staticmethod
    def from_csv(text: str, devices_per_node: int, *, where: str = "links.csv") -> Links:
        """One line per source device, one number per destination; empty lines and lines that start with # are left."""
        rows: list[list[Any]] = []
        places: list[list[str]] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            cells = next(csv.reader([line]))
            rows.append([_number(cell) for cell in cells])
            starts = np.cumsum([1] + [len(cell) + 1 for cell in cells[:-1]])
            places.append([str(Location(where, number, int(start))) for start in starts])
        return Links.from_matrix(_matrix(rows, places, where), devices_per_node)

    @staticmethod
    def from_topology(
        text: str, *, nodes: int = 1, other_node_gb_s: float = 50.0, where: str = "topology"
    ) -> Links:
        """The text of `nvidia-smi topo -m` of one host, repeated over `nodes` equal hosts; cost in us per byte.

        `NVn` is n NVLinks, everything else goes over PCIe; other nodes over a network of other_node_gb_s per device
        (50: one 400 Gb/s card). These are peaks per direction by the links' names, not measurements.
        """
        names, lines = _topology(text, where)
        order = _by_speed({name for row in names for name in row} - {"X"})
        tiers = (SAME_DEVICE, *order) + ((OTHER_NODE,) if nodes > 1 else ())
        index = {"X": 0} | {name: tiers.index(name) for name in order}
        host = np.array([[index[name] for name in row] for row in names], np.int64)
        if (host.diagonal() != 0).any():
            row = int(np.flatnonzero(host.diagonal())[0])
            raise InputError(
                f"GPU{row} is not marked X against itself",
                where=Location(where, lines[row], 1),
                hint="paste the table of `nvidia-smi topo -m` whole",
            )
        per_byte = np.array([0.0, *(1e-3 / _gb_s(name) for name in order), 1e-3 / other_node_gb_s])
        size = len(host)
        tier = np.full((nodes * size, nodes * size), len(order) + 1, np.int64)
        for node in range(nodes):
            tier[node * size : (node + 1) * size, node * size : (node + 1) * size] = host
        return Links(tiers=tiers, tier=tier, cost=per_byte[tier])


def _topology(text: str, where: str) -> tuple[list[list[str]], list[int]]:
    """The link names among GPUs [gpus][gpus], and the line each row stands on."""
    # A terminal underlines the header of this table.
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    header = next(
        (i for i, line in enumerate(lines) if re.match(r"\s*GPU0\b", line) and "X" not in line.split()), None
    )
    if header is None:
        raise InputError(
            "there is no line of GPU0, GPU1, ...",
            where=Location(where, 1, 1),
            hint="paste the output of `nvidia-smi topo -m` whole",
        )
    count = sum(bool(re.fullmatch(r"GPU\d+", cell)) for cell in lines[header].split())
    names, numbers = [], []
    for gpu in range(count):
        number = next((i for i in range(header + 1, len(lines)) if re.match(rf"GPU{gpu}\b", lines[i])), None)
        if number is None:
            raise InputError(
                f"GPU{gpu} has no row", where=Location(where, header + 1, 1), hint="paste the table whole"
            )
        cells = lines[number].split()[1 : count + 1]
        for position, cell in enumerate(cells):
            if cell not in ("X", *PCIE) and not re.fullmatch(r"NV[1-9]\d*", cell):
                column = [m.start() for m in re.finditer(r"\S+", lines[number])][position + 1] + 1
                raise InputError(
                    f"{cell!r} is not a link",
                    where=Location(where, number + 1, column),
                    hint=f"links are X, NV1 to NV18 and {', '.join(PCIE)}",
                )
        if len(cells) < count:
            raise InputError(
                f"GPU{gpu} lists {len(cells)} links of {count}",
                where=Location(where, number + 1, 1),
                hint="paste the table whole",
            )
        names.append(cells)
        numbers.append(number + 1)
    return names, numbers


def _gb_s(name: str) -> float:
    return NVLINK_GB_S * int(name[2:]) if name.startswith("NV") else PCIE_GB_S


def _by_speed(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (-_gb_s(name), PCIE.index(name) if name in PCIE else -1)))


def _number(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell.strip()


def _matrix(rows: list[list[Any]], places: list[list[str]], where: str) -> Floats:
    if not rows or len(rows) > MAX_DEVICES:
        raise InputError(f"it has {len(rows)} rows", where=where, hint=f"give 1 to {MAX_DEVICES} devices")
    for i, row in enumerate(rows):
        if len(row) != len(rows):
            raise InputError(
                f"row {i} has {len(row)} entries, but there are {len(rows)} rows",
                where=places[i][0] if places[i] else where,
                hint="the matrix must be square: one row and one column per device",
            )
        for j, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(
                    f"{value!r} is not a cost", where=places[i][j], hint="costs are finite and not negative"
                )
    return np.array(rows, np.float64)


def _validate(links: Links, where: str) -> None:
    size = len(links.cost)
    if links.cost.shape != (size, size) or links.tier.shape != (size, size) or size < 1:
        raise InputError(
            f"cost has shape {list(links.cost.shape)}, tier {list(links.tier.shape)}",
            where=where,
            hint="both must be [devices, devices]",
        )
    wrong = np.argwhere(~(np.isfinite(links.cost) & (links.cost >= 0)))
    if len(wrong):
        i, j = (int(x) for x in wrong[0])
        raise InputError(
            f"the cost from device {i} to {j} is {links.cost[i, j]}", where=where, hint="use 0 or more"
        )
    if links.cost.diagonal().any():
        device = int(np.flatnonzero(links.cost.diagonal())[0])
        raise InputError(
            f"device {device} pays {links.cost[device, device]} for a byte to itself",
            where=where,
            hint="the diagonal must be 0",
        )
    if links.tier.min() < 0 or links.tier.max() >= len(links.tiers):
        raise InputError(
            f"tier holds indices outside [0, {len(links.tiers)})", where=where, hint="index into `tiers`"
        )
