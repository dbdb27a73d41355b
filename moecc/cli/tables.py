"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from moecc.solvers.routing_stats import RoutingStats
from moecc.solvers.trace_metrics import Locality

_MIN_WIDTH = 160


def wide_console() -> Console:
    """Wide enough for every table where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(_MIN_WIDTH, console.width))


def plain_table(*columns: str) -> Table:
    """Without lines; the first column is text, the others are figures."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def print_report(report: Mapping[str, Any], output: Path | None) -> None:
    """The closing table of a compile: placement, predicted steps, kernels, memory, notes."""
    console = wide_console()
    if placement := report["placement"]:
        print_titled(console, _placement_title(placement), _placement(placement))
    print_titled(console, "Predicted step time", _steps(report["steps"]))
    if report["kernels"]:
        print_titled(console, "Kernels", _kernels(report["kernels"]))
    print_titled(console, "Memory of one device", _memory(report["memory"], report["serving"]))
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if output is not None:
        console.print(f"\n{output} written in {report['seconds']:.1f} s", markup=False)


def print_titled(console: Console, title: str, table: Table) -> None:
    """A bold line, the table, an empty line."""
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table, "")


def _placement_title(placement: Mapping[str, Any]) -> str:
    certificate = placement["certificate"]
    held_out = sum(placement["held_out_tokens"].values())
    proof = f"{certificate['status']}, {certificate['solver']}, {certificate['wall_s']:.1f} s"
    return f"Placement, judged on {held_out:,} held-out tokens ({proof})"


def _placement(placement: Mapping[str, Any]) -> Table:
    table = plain_table(
        "layer",
        "imbalance before",
        "after",
        "devices per token before",
        "after",
    )
    for layer in placement["layers"]:
        table.add_row(str(layer["layer"]), *_before_after(layer["before"], layer["after"]))
    table.add_row("mean", *_before_after(placement["before"], placement["after"]), style="bold")
    if placement["before"]["hops"] or placement["after"]["hops"]:
        table.add_row(
            "hops", "", "", f"{placement['before']['hops']:.3f}", f"{placement['after']['hops']:.3f}"
        )
    return table


def _before_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    return [f"{side[key]:.3f}" for key in ("imbalance", "fan_out") for side in (before, after)]


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("phase", "tokens/device", "serial ms", "overlapped ms", "bound ms", "chunks")
    for step in steps:
        chunks = ", ".join(f"{f['name']} {f['chunks']}" for f in step["functions"])
        times = [f"{step[key] / 1e3:.3f}" for key in ("serial_us", "makespan_us", "bound_us")]
        table.add_row(step["phase"], f"{step['tokens_per_device']:,}", *times, chunks)
    return table


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("kernel", "target", "registers", "shared KB", "spill B", "loop instr.", "matrix")
    table = plain_table(*columns)
    for row in kernels:
        table.add_row(
            f"{row['set']}.{row['kernel']}",
            row["target"],
            _or_dash(row["registers"]),
            "-" if row["shared_bytes"] is None else f"{row['shared_bytes'] / 1024:.1f}",
            _or_dash(row["spill_bytes"]),
            str(row["loop_instructions"] or "-"),
            row["matrix_instruction"],
        )
    return table


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _memory(memory: Mapping[str, Any], serving: Mapping[str, Any]) -> Table:
    sequences = f"KV cache, {memory['cached_sequences']:,} sequences of {serving['context']:,} tokens"
    names = {"weights": "weights", "kv_cache": sequences, "workspace": "workspace", "used": "used"}
    table = plain_table("part", "GB")
    for key, name in (names | {"capacity": "capacity"}).items():
        table.add_row(name, f"{memory[f'{key}_bytes'] / 1e9:.2f}", style="bold" if key == "used" else "")
    return table


def print_trace_stats(stats: Sequence[tuple[RoutingStats, Locality]]) -> None:
    """Two tables, one row a trace, means over layers."""
    structure = plain_table(
        "trace",
        "tokens",
        "sequences",
        "layers",
        "top k of",
        "load skew",
        "entropy bits",
        "co-activation",
        "adjacent bits",
    )
    local = plain_table("trace", "segment tokens", "SRP", "experts used / top k", "cached experts", "SCH")
    for s, where in stats:
        structure.add_row(
            s.name,
            f"{s.tokens:,}",
            f"{s.sequences:,}",
            str(len(s.load_skew)),
            f"{s.top_k} of {s.experts}",
            *(f"{fmean(x):.3f}" for x in (s.load_skew, s.load_entropy_bits, s.co_activation)),
            f"{fmean(s.adjacent_information_bits):.3f}" if s.adjacent_information_bits else "-",
        )
        local.add_row(
            s.name,
            str(where.segment_tokens),
            *(f"{fmean(x):.3f}" for x in (where.srp, where.srp_size_ratio)),
            str(where.cache_experts),
            f"{fmean(where.sch):.3f}",
        )
    console = wide_console()
    print_titled(console, "Routing, means over layers", structure)
    print_titled(
        console, "Locality, means over layers: best segment router (SRP), segment cache hit rate (SCH)", local
    )


def print_bench(bench: Mapping[str, Any]) -> None:
    """One row a kernel set: predicted by device, measured with quartiles, and what the machine achieved."""
    console = wide_console()
    devices = list(dict.fromkeys(name for row in bench["rows"] for name in row["predicted_us"]))
    predicted = [f"predicted ms, {name}" for name in devices]
    measured = (f"measured ms, {bench['machine']}", "quartiles", "rounds")
    table = plain_table(
        "kernels", "tokens", *predicted, *measured, "GFLOP", "MB", "GFLOP/s", "GB/s", "of memory's"
    )
    for row in bench["rows"]:
        times = [f"{row['predicted_us'][name] / 1e3:.3f}" for name in devices]
        gflop, mega = row["work"]["flops"] / 1e9, row["work"]["bytes"] / 1e6
        sizes = [f"{gflop:.3f}", f"{mega:.1f}"]
        table.add_row(row["kernels"], f"{row['tokens']:,}", *times, *_measured(row), *sizes, *_achieved(row))
    title = "Measured beside predicted"
    if bench["read_gb_s"] is not None:
        title += f"; reading memory alone reaches {bench['read_gb_s']:.1f} GB/s"
    print_titled(console, title, table)
    notes = [f"{row['kernels']} was not run: {row['why']}" for row in bench["rows"] if row["why"]]
    for note in [*notes, *bench["notes"]]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _measured(row: Mapping[str, Any]) -> list[str]:
    if row["measured_us"] is None:
        return ["-", "-", "-"]
    median, lower, upper = (row[key] / 1e3 for key in ("measured_us", "lower_us", "upper_us"))
    return [f"{median:.3f}", f"{lower:.3f}-{upper:.3f}", str(row["rounds"])]


def _achieved(row: Mapping[str, Any]) -> list[str]:
    if row["measured_us"] is None:
        return ["-", "-", "-"]
    rates = (row["work"][key] / row["measured_us"] / 1e3 for key in ("flops", "bytes"))
    return [*(f"{rate:.1f}" for rate in rates), f"{row['bandwidth_share']:.0%}"]
