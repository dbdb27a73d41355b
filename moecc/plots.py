"""A placement drawn: who holds what, how loaded devices are, who sends to whom, and what balance costs in traffic."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.placement.check_traffic import hosts, traffic_matrix
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.placing import Placed
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import halves
from moecc.solvers.placement.sweep import SweepPoint, sweep_point, swept_layers
from moecc.solvers.routing import Routing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
FORMATS = ("png", "svg")
# Okabe and Ito's palette and cividis are told apart with any colour vision.
GREY, BLUE, ORANGE = "#7f7f7f", "#0072B2", "#D55E00"
SEQUENTIAL = "cividis"
WIDE_TICKS, TICKS = 16, 8
MAX_DEVICES = 64
"""With more than these, devices are drawn as areas, and traffic between nodes."""


def image_format(path: Path) -> str:
    """Errors: InputError for an ending that cannot be drawn, and where matplotlib is not installed."""
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise InputError(f"ending {path.suffix!r} is unknown", where=str(path), hint="use .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "drawing needs matplotlib", where=str(path), hint="pip install 'moecc[plot]'"
        ) from None
    return ending


def draw_placed(
    format: str, problem: PlacementProblem, placed: Placed, points: Sequence[SweepPoint]
) -> bytes:
    """The image as a file's bytes, all panels on held-out sequences. points: a sweep's, may be empty."""
    from matplotlib.figure import Figure

    _, held_out = halves(problem)
    before, after = placed.identity, placed.solution.placement
    loads = [_slot_loads(side, held_out, problem.shares) for side in (before, after)]
    figure = Figure(figsize=(11, 13.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.15, 1, 1.05))
    _draw_slots(figure, figure.add_subplot(grid[0, :]), after, loads[1])
    _draw_loads(figure.add_subplot(grid[1, 0]), before, loads, problem.max_imbalance)
    marks = [
        sweep_point(name, side, problem) for name, side in (("identity", before), ("this placement", after))
    ]
    _draw_sweep(figure.add_subplot(grid[1, 1]), problem, points, marks)
    _draw_traffic(
        figure, [figure.add_subplot(grid[2, i]) for i in (0, 1)], problem, (before, after), held_out
    )
    names, width = ", ".join(routing.name for routing in held_out), after.slots_per_device
    figure.suptitle(
        f"{after.layers} layers of {after.num_experts} experts on {after.devices} devices,"
        f" {width} slot{'s' if width > 1 else ''} each\nheld-out sequences of {names}",
        fontsize=13,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=110, metadata=_undated(format))
    return buffer.getvalue()


def _undated(format: str) -> dict[str, Any]:
    """Without a date the same placement gives the same file."""
    return {"Date": None} if format == "svg" else {"Software": None}


def _slot_loads(placement: Placement, workloads: Sequence[Routing], shares: Floats) -> Floats:
    """[layers, slots] of the workloads' mixture, in mean device loads: a layer sums to the number of devices."""
    mixture = np.einsum("w,wle->le", shares, np.stack([routing.loads() for routing in workloads]))
    out = np.empty(placement.physical_to_logical.shape)
    for layer, row in enumerate(placement.physical_to_logical):
        out[layer] = (mixture[layer] / np.bincount(row, minlength=placement.num_experts))[row]
    return out * placement.devices


def _device_loads(placement: Placement, slots: Floats) -> Floats:
    """[layers, devices]."""
    return np.asarray(slots.reshape(placement.layers, placement.devices, -1).sum(axis=2), np.float64)


def _draw_slots(figure: Figure, axes: Axes, placement: Placement, loads: Floats) -> None:
    by_device = loads.reshape(placement.layers, placement.devices, -1) * placement.slots_per_device
    shown = -np.sort(-by_device, axis=2).reshape(placement.layers, -1)
    image = axes.imshow(
        shown, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=np.quantile(shown, 0.995), interpolation="nearest"
    )
    width = placement.slots_per_device
    if placement.devices <= MAX_DEVICES:
        for device in range(1, placement.devices):
            node = device % placement.devices_per_node == 0
            axes.axvline(device * width - 0.5, color="white", linewidth=2.5 if node else 0.8)
    shown_devices = _ticks(placement.devices, WIDE_TICKS)
    axes.set_xticks(shown_devices * width + (width - 1) / 2, [str(d) for d in shown_devices])
    axes.set(xlabel="device (its slots side by side, busiest first)", ylabel="layer with experts")
    axes.set_title("Placement: load of every slot's expert")
    figure.colorbar(image, ax=axes, label="load / mean slot load", pad=0.01)


def _draw_loads(axes: Axes, placement: Placement, slots: Sequence[Floats], cap: float | None) -> None:
    device, many = np.arange(placement.devices), placement.devices > MAX_DEVICES
    for loads, name, colour, shift, marker in zip(
        slots, ("identity", "this placement"), (GREY, BLUE), (-0.16, 0.16), "so", strict=True
    ):
        table = _device_loads(placement, loads)
        low, mean, high = table.min(axis=0), table.mean(axis=0), table.max(axis=0)
        if many:
            axes.fill_between(device, low, high, color=colour, alpha=0.35, linewidth=0)
            axes.plot(device, mean, color=colour, linewidth=1.2, label=name)
        else:
            axes.vlines(device + shift, low, high, color=colour, linewidth=2)
            axes.plot(device + shift, mean, marker, color=colour, label=name, markersize=4, linestyle="none")
    axes.axhline(1, color="black", linewidth=0.8)
    if cap is not None:
        axes.axhline(
            cap, color=ORANGE, linestyle="--", linewidth=1.2, label=f"cap {cap:g} (mean over layers)"
        )
    axes.set_xticks(_ticks(placement.devices))
    axes.set(xlabel="device", ylabel="load / mean device load", ylim=(0, None))
    axes.set_title("Load of each device: mean, least, most over layers")
    axes.legend(frameon=False, fontsize=9, loc="upper right" if many else "lower right")


def _draw_sweep(
    axes: Axes, problem: PlacementProblem, points: Sequence[SweepPoint], marks: Sequence[SweepPoint]
) -> None:
    front = sorted((point for point in points if _best(point, points)), key=lambda point: point.imbalance)
    axes.plot([p.imbalance for p in points], [p.cost for p in points], "o", color=GREY, markersize=5)
    if front:
        axes.step(
            [p.imbalance for p in front],
            [p.cost for p in front],
            where="post",
            color=BLUE,
            linewidth=1.2,
            label="best of a short sweep of caps",
        )
    labels: dict[tuple[float, float], list[str]] = {}
    for point in points:
        labels.setdefault((point.imbalance, point.cost), []).append(point.label.removeprefix("cap "))
    for place, names in labels.items():
        axes.annotate(
            ", ".join(names),
            place,
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color="#404040",
        )
    for point, marker, colour in zip(marks, "sD", ("black", ORANGE), strict=True):
        axes.plot(point.imbalance, point.cost, marker, color=colour, markersize=8, label=point.label)
    noun = "hops per token and layer" if problem.execution == "migrate" else "devices per token and layer"
    axes.set(xlabel=f"imbalance ({problem.balance})", ylabel=noun)
    swept = len(swept_layers(problem))
    axes.set_title(f"What balance costs, on {swept} of {problem.layers} layers")
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _best(point: SweepPoint, points: Sequence[SweepPoint]) -> bool:
    """Whether no other point is at least as good in both and better in one."""
    return not any(
        (p.imbalance <= point.imbalance and p.cost < point.cost)
        or (p.imbalance < point.imbalance and p.cost <= point.cost)
        for p in points
    )


def _draw_traffic(
    figure: Figure,
    axes: Sequence[Axes],
    problem: PlacementProblem,
    sides: Sequence[Placement],
    held_out: Sequence[Routing],
) -> None:
    measure = _hops_between if problem.execution == "migrate" else traffic_matrix
    tables = [
        np.asarray(sum(s * measure(p, r) for s, r in zip(problem.shares, held_out, strict=True)))
        for p in sides
    ]
    unit, count = "device", problem.devices
    totals = [float(table.sum()) for table in tables]
    if count > MAX_DEVICES:
        per_node = problem.devices_per_node
        unit, count = "node", count // per_node
        tables = [table.reshape(count, per_node, count, per_node).sum(axis=(1, 3)) for table in tables]
    top = max(float(table.max()) for table in tables) or 1.0
    noun = "hops" if problem.execution == "migrate" else "copies"
    for one, table, total, name in zip(axes, tables, totals, ("identity", "this placement"), strict=True):
        image = one.imshow(table, cmap=SEQUENTIAL, vmin=0, vmax=top, interpolation="nearest")
        one.set_xticks(_ticks(count))
        one.set_yticks(_ticks(count))
        one.set(xlabel=f"to {unit}", ylabel=f"from {unit}")
        one.set_title(f"Traffic, {name}: {total:.3f} {noun} per token and layer", fontsize=11)
    figure.colorbar(image, ax=axes[1], label=f"{noun} per token and layer")


def _hops_between(placement: Placement, routing: Routing) -> Floats:
    """[devices, devices]: share of the tokens that leave row for column between two layers under `migrate`."""
    land = np.stack(
        [
            np.argmax(hosts(placement, layer)[routing.topk_ids[:, layer]].sum(axis=1), axis=1)
            for layer in range(placement.layers)
        ]
    )
    devices, steps = placement.devices, land[1:].size
    flat = (land[:-1] * devices + land[1:]).ravel()
    table = np.bincount(flat, minlength=devices * devices).reshape(devices, devices) / max(1, steps)
    np.fill_diagonal(table, 0.0)
    return np.asarray(table, np.float64)


def _ticks(count: int, most: int = TICKS) -> NDArray[np.int64]:
    return np.arange(0, count, -(-count // most))
