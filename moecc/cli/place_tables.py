"""What `moecc place` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moecc.cli.tables import plain_table, print_titled, wide_console
from moecc.solvers.placement.placement import Margin
from moecc.solvers.placement.placing import Placed
from moecc.solvers.placement.recheck import Recheck
from moecc.solvers.placement.report import PlacingReport

_FIGURES = {
    "fan_out": "devices per token",
    "node_fan_out": "nodes per token",
    "hops": "hops per token and layer",
    "same_device_pairs": "adjacent expert pairs on one device",
    "link_cost": "cost of the links",
}


def print_placed(placed: Placed, files: Sequence[Path], notes: Sequence[str], flags: Sequence[str]) -> None:
    """The figures side by side, then what to know, then the files."""
    console, report = wide_console(), placed.report
    print_titled(console, _title(placed), _overview(report))
    print_titled(console, "Workloads, held-out sequences", _workloads(report))
    if report.dispatch:
        print_titled(
            console, f"Replicas as the engine picks them ({report.dispatch['rule']})", _dispatch(report)
        )
    if report.homes:
        title = f"Homes chosen for each {report.homes['unit']}, by its predicted experts"
        print_titled(console, title, _homes(report.homes))
    if report.unseen:
        print_titled(console, "Unseen workloads: each placed for by the others alone", _unseen(report))
    certificate = placed.solution.certificate
    if margin := certificate.margin:
        _say(console, _margin(margin))
    if memory := report.memory:
        _say(console, _memory(memory, report.request))
    if moves := report.moves:
        _say(console, _moves(moves))
    for execution, sentence in report.affinity.items():
        _say(console, f"{execution}: {sentence}")
    for warning in report.warnings:
        _say(console, f"warning: {warning}")
    for note in (*report.assumptions, *notes, *filter(None, [certificate.note])):
        _say(console, f"note: {note}")
    _say(console, f"\nwritten: {', '.join(map(str, files))}")
    for line in flags:
        _say(console, line)


def print_recheck(path: Path, found: Recheck) -> None:
    """One line, and one for every figure that disagrees."""
    console = wide_console()
    for line in found.wrong:
        _say(console, line)
    agree = found.figures - len(found.wrong)
    skipped = f"; cannot be recomputed: {', '.join(found.skipped)}" if found.skipped else ""
    _say(console, f"{path}: {agree} of {found.figures} figures agree with the traces{skipped}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _margin(margin: Margin) -> str:
    return (
        f"max_imbalance: {margin.asked:g} asked for unseen sequences; held-out ones exceeded it by {margin.gap:.3f} in"
        f" trials, so {margin.cap:.3f} was solved for; expected on unseen ones {margin.expected:.3f}"
    )


def _memory(memory: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    return (
        f"memory: every device holds {memory['device_bytes'] / 1e9:.2f} GB of experts, {request['slots_per_device']} of"
        f" {memory['expert_bytes'] / 1e6:.4g} MB in each layer"
    )


def _moves(moves: Mapping[str, Any]) -> str:
    return (
        f"moves: {moves['experts']} experts, {moves['moved_bytes'] / 1e9:.2f} GB, in {len(moves['rounds'])} rounds;"
        f" a device holds at most {moves['peak_extra_bytes'] / 1e9:.2f} GB beyond its slots meanwhile"
    )


def _title(placed: Placed) -> str:
    wanted, certificate = placed.report.request, placed.solution.certificate
    nodes = wanted["devices"] // wanted["devices_per_node"]
    bound = "no bound" if certificate.gap is None else f"gap {certificate.gap:.2%}"
    return (
        f"{placed.solution.placement.layers} layers of {placed.solution.placement.num_experts} experts on"
        f" {wanted['devices']} devices in {nodes} node{'s' if nodes > 1 else ''},"
        f" {wanted['slots_per_device']} slots each:"
        f" {wanted['objective']} under {wanted['execution']}"
        f" ({certificate.status}, {bound}, {certificate.solver}, {certificate.wall_s:.1f} s)"
    )


def _overview(report: PlacingReport) -> Table:
    balance = report.request["balance"]
    rows = {
        "balance_imbalance": f"imbalance ({balance})",
        "pooled_imbalance": "imbalance (pooled)",
        **_FIGURES,
    }
    if balance == "pooled":
        rows = {"imbalance": "imbalance (workload)", **rows}
    if report.request["objective"] == "step":
        rows = {"objective": "predicted us per layer", **rows}
    table = plain_table("", "solved on: identity", "placed", "held out: identity", "placed")
    sides = [
        half[side]
        for half in (report.in_sample, {"before": report.before, "after": report.after})
        for side in ("before", "after")
    ]
    for key, name in rows.items():
        values = [side[key] for side in sides]
        # A single node is always reached, and what costs nothing says nothing.
        if any(values) and not (key == "node_fan_out" and all(value == 1 for value in values)):
            table.add_row(name, *(f"{value:.3f}" for value in values))
    for tier in report.after["copies"]:
        values = [side["copies"][tier] for side in sides]
        if any(values):
            table.add_row(f"copies of a token, {tier}", *(f"{value:.3f}" for value in values))
    return table


def _workloads(report: PlacingReport) -> Table:
    cost, name = _cost(report)
    table = plain_table("workload", "tokens", "imbalance: identity", "placed", f"{name}: identity", "placed")
    for workload, tokens in report.held_out_tokens.items():
        sides = [side["workloads"][workload] for side in (report.before, report.after)]
        table.add_row(workload, f"{tokens:,}", *_figures(sides, cost))
    return table


def _dispatch(report: PlacingReport) -> Table:
    table = plain_table("held out", "identity", "placed")
    for key, name in {
        "imbalance": "imbalance (workload)",
        "pooled_imbalance": "imbalance (pooled)",
        "fan_out": "devices per token",
        "remote_fan_out": "devices per token but its home",
    }.items():
        table.add_row(name, *(f"{report.dispatch[side][key]:.3f}" for side in ("before", "after")))
    return table


def _homes(homes: Mapping[str, Any]) -> Table:
    table = plain_table("workload", "devices but home: random", "chosen", "tokens of the fullest home / mean")
    for name, found in homes["workloads"].items():
        table.add_row(name, *(f"{found[key]:.3f}" for key in ("random", "chosen", "fullest")))
    return table


def _unseen(report: PlacingReport) -> Table:
    """Beside identity and the unseen placement also the one that has seen the workload."""
    cost, name = _cost(report)
    columns = ("identity", "unseen", "seen")
    table = plain_table(
        "workload",
        *(f"imbalance: {c}" if c == "identity" else c for c in columns),
        *(f"{name}: {c}" if c == "identity" else c for c in columns),
    )
    for row in report.unseen:
        seen = report.after["workloads"][row["workload"]]
        table.add_row(row["workload"], *_figures([row["before"], row["after"], seen], cost))
    return table


def _figures(sides: Sequence[Mapping[str, Any]], cost: str) -> list[str]:
    return [f"{side[key]:.3f}" for key in ("imbalance", cost) for side in sides]


def _cost(report: PlacingReport) -> tuple[str, str]:
    return ("hops", "hops") if report.request["execution"] == "migrate" else ("fan_out", "devices")
