"""The tables of moecc cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from moecc.autotune.key import Environment
from moecc.autotune.record import Record
from moecc.autotune.sharing import Found
from moecc.cli.tables import plain_table, print_titled, wide_console

_HASH_SHOWN = 10


def entry_row(record: Record, environment: Environment | str | None) -> dict[str, Any]:
    """What ls says about one entry."""
    return {
        "key": record.key.hash,
        "device": _device(environment),
        "op": record.key.op,
        "kernel": record.key.kernel,
        "tokens": record.key.tokens,
        "shape": f"{record.key.experts}x{record.key.hidden}x{record.key.intermediate} top {record.key.top_k}",
        "dtype": record.key.dtype,
        "best_us": record.best.median_us,
        "speedup": _speedup(record),
        "measured": len(record.measured),
        "date": record.date,
        "signed": bool(record.signature),
    }


def print_entries(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (
        "key",
        "device",
        "op",
        "kernel",
        "tokens",
        "shape",
        "dtype",
        "best us",
        "speedup",
        "configs",
        "date",
    )
    table = plain_table(*columns)
    for row in rows:
        _add_row(
            table,
            row["key"][:_HASH_SHOWN],
            *(str(row[name]) for name in ("device", "op", "kernel", "tokens", "shape", "dtype")),
            "-" if row["best_us"] is None else f"{row['best_us']:.1f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
            str(row["measured"]),
            row["date"][:10],
        )
    wide_console().print(table)


def print_record(record: Record, environment: Environment | str | None) -> None:
    """Key and environment as they are, then the configs, the fastest first."""
    console = wide_console()
    facts = plain_table("field", "value")
    known = (
        asdict(environment) if isinstance(environment, Environment) else {"environment": record.environment}
    )
    own = {"date": record.date, "baseline_us": record.baseline_us, "signer": record.signer or "-"}
    for name, value in (known | asdict(record.key) | own | dict(record.tools)).items():
        _add_row(facts, name, str(value))
    print_titled(console, record.key.hash, facts)
    configs = plain_table("config", "median us", "spread us", "outcome")
    for item in record.measured:
        times = ["-" if time is None else f"{time:.2f}" for time in (item.median_us, item.spread_us)]
        _add_row(configs, item.text, *times, item.reason or item.outcome)
    print_titled(console, f"{len(record.measured)} configs", configs)


def stats_rows(known: Mapping[str, Environment | str], found: Sequence[Found]) -> list[dict[str, Any]]:
    """One row for each environment that has a manifest or an entry."""
    rows = []
    for name in sorted({*known, *(item.environment for item in found)}):
        here = [item for item in found if item.environment == name]
        records = [item.record for item in here if item.record]
        speedups = [speedup for record in records if (speedup := _speedup(record))]
        rows.append(
            {
                "environment": name,
                "device": _device(known.get(name)),
                "entries": len(records),
                "bad": len(here) - len(records),
                "configs": sum(len(record.measured) for record in records),
                "bytes": sum(item.bytes for item in here),
                "median_speedup": median(speedups) if speedups else None,
            }
        )
    return rows


def print_stats(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    table = plain_table("environment", "device", "entries", "bad", "configs", "MB", "median speedup")
    for row in rows:
        speedup = row["median_speedup"]
        _add_row(
            table,
            row["environment"][:_HASH_SHOWN],
            *(str(row[name]) for name in ("device", "entries", "bad", "configs")),
            f"{row['bytes'] / 1e6:.2f}",
            "-" if speedup is None else f"{speedup:.2f}",
        )
    print_titled(wide_console(), str(folder), table)


def _add_row(table: Table, *cells: str) -> None:
    """Cells as they are: brackets in texts from elsewhere are no markup."""
    table.add_row(*map(Text, cells))


def _device(environment: Environment | str | None) -> str:
    return environment.device if isinstance(environment, Environment) else "?"


def _speedup(record: Record) -> float | None:
    """Of the best config over the baseline."""
    best = record.best.median_us
    return record.baseline_us / best if record.baseline_us and best else None
