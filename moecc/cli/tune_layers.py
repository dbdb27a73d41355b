"""moecc tune: layers are measured on this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from moecc.errors import InputError, MoeccError

if TYPE_CHECKING:
    from moecc.autotune.session import Tuned
    from moecc.autotune.tune import Progress
    from moecc.codegen.config import DType, LayerShape

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One rank's share of a layer: `slots` of the experts."""

    hidden: int
    intermediate: int
    experts: int
    slots: int
    top_k: int

    def tokens_here(self, tokens: int) -> int:
        """Of all choices so many tokens' worth fall on this rank's experts."""
        return -(-tokens * self.slots // self.experts)


@dataclass(frozen=True, kw_only=True)
class Limits:
    trials: int
    time_limit_s: float | None


def flag_shapes(layer: LayerSizes, counts: Sequence[int], dtype: str) -> list[LayerShape]:
    """InputError for sizes that make no layer."""
    from moecc.codegen.config import LayerShape

    return [
        LayerShape(
            tokens=layer.tokens_here(count),
            hidden=layer.hidden,
            intermediate=layer.intermediate,
            experts=layer.experts,
            top_k=layer.top_k,
            slots=None if layer.slots == layer.experts else layer.slots,
            dtype=cast("DType", dtype),
        )
        for count in counts
    ]


def artifact_shapes(folder: Path, counts: Sequence[int] | None) -> list[LayerShape]:
    """The layers of an artifact, for the token counts that it was compiled for or for those given."""
    from moecc.artifact import load_artifact
    from moecc.codegen.layers import kernel_sets
    from moecc.ir.parser import parse_module

    artifact = load_artifact(folder)
    name = max((name for name in artifact.manifest["files"] if name.startswith("ir/")), default="")
    if not name:
        raise InputError("the artifact holds no IR", where=str(folder), hint="compile again")
    shapes = [kernels.shape for kernels in kernel_sets(parse_module(artifact.read(name), name))]
    if not shapes:
        hint = "compile a model with MoE layers"
        raise InputError("the artifact has no kernels", where=str(folder), hint=hint)
    if counts is None:
        return shapes
    return [replace(shape, tokens=count, received=None) for shape in shapes for count in counts]


def tune_layers(shapes: Sequence[LayerShape], limits: Limits, *, trace: Path | None, as_json: bool) -> None:
    """Measures, keeps and prints. MoeccError where the time did not suffice for any measurement of a layer."""
    from moecc.artifact import tool_versions
    from moecc.autotune.cache_settings import read_settings
    from moecc.autotune.routing_class import shares_of
    from moecc.autotune.session import tune_shapes
    from moecc.autotune.tune import Budget
    from moecc.frontend.trace import load_trace
    from moecc.runtime.load import best_device, target_of

    _check(limits)
    began = time.monotonic()
    ends_at = began + limits.time_limit_s if limits.time_limit_s else float("inf")
    shares = shares_of([load_trace(trace)]) if trace else ()
    progress = ProgressLines(began, ends_at)
    done = tune_shapes(
        shapes,
        target_of(best_device()[1]),
        settings=read_settings(),
        budget=Budget(trials=limits.trials, ends_at=ends_at),
        tools=tool_versions(),
        shares=shares,
        shares_from=str(trace),
        report=progress,
    )
    rows = [_row(tuned) for tuned in done]
    if as_json:
        typer.echo(json.dumps({"layers": rows, "seconds": round(time.monotonic() - began, 1)}, indent=1))
    else:
        _print(rows)
    if not all(tuned.record for tuned in done):
        raise MoeccError("the time did not suffice for every layer", where="--time-limit", hint="give more")


def _check(limits: Limits) -> None:
    if limits.trials < 1:
        raise InputError(f"{limits.trials} is not positive", where="--trials", hint="use 1 or more")
    if limits.time_limit_s is not None and not 0 < limits.time_limit_s < float("inf"):
        hint = "give seconds, more than 0"
        raise InputError(f"{limits.time_limit_s} is no time", where="--time-limit", hint=hint)


def _row(tuned: Tuned) -> dict[str, Any]:
    """What was found for one layer; null where nothing was."""
    shape, record = tuned.shape, tuned.record
    row: dict[str, Any] = {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "experts": shape.held_experts,
        "top_k": shape.top_k,
        "dtype": shape.dtype,
        "routing": tuned.routing,
        "measured": tuned.measured,
        "compiled": tuned.compiled,
    }
    found = {
        "key": record and record.key.hash,
        "known": len(record.measured) if record else 0,
        "best_us": record and record.best.median_us,
        "spread_us": record and record.best.spread_us,
        "default_us": record and record.baseline_us,
        "config": record and record.best.config,
    }
    return row | found


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from moecc.cli.tables import plain_table, print_titled, wide_console

    table = plain_table("tokens", "layer", "routing", "default us", "best us", "spread us", "known", "new")
    for row in rows:
        times = [row[name] for name in ("default_us", "best_us", "spread_us")]
        table.add_row(
            str(row["tokens"]),
            f"{row['experts']}x{row['hidden']}x{row['intermediate']} top {row['top_k']} {row['dtype']}",
            row["routing"],
            *("-" if time_us is None else f"{time_us:.1f}" for time_us in times),
            str(row["known"]),
            str(row["measured"]),
        )
    print_titled(wide_console(), "Tuned on this machine; moecc compile and run use it", table)


@dataclass
class ProgressLines:
    """A line on stderr every few seconds: what is done, how much is known, the best so far, and the time left.

    The time left supposes that configs take as long as those before; less is left where the limit ends first.
    """

    began: float
    ends_at: float
    said_at: float = float("-inf")
    starts: dict[LayerShape, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, shape: LayerShape, progress: Progress) -> None:
        now = time.monotonic()
        since, known = self.starts.setdefault(shape, (now, progress.known))
        if now - self.said_at < SECONDS_BETWEEN_LINES:
            return
        self.said_at = now
        print(
            f"{shape.tokens} tokens: {self._text(progress, now - since, known)}", file=sys.stderr, flush=True
        )

    def _text(self, progress: Progress, seconds: float, known: int) -> str:
        text = f"{progress.doing}, {progress.known} of {progress.wanted} known"
        if progress.best_us and progress.baseline_us:
            text += f", best {progress.best_us:.1f} us, default {progress.baseline_us:.1f} us"
        left_s = self.ends_at - time.monotonic()
        if progress.known > known:
            left_s = min(left_s, seconds / (progress.known - known) * (progress.wanted - progress.known))
        return text if left_s == float("inf") else f"{text}, {max(left_s, 0):.0f} s left"
