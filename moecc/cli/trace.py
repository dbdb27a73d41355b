"""moecc trace"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Record routing traces and look at them.", no_args_is_help=True)


@app.command("record")
def record_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a transformers checkpoint.", show_default=False)
    ],
    inputs: Annotated[list[Path], typer.Option("--input", help="Text file or folder, repeatable.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .npz to write.")],
    name: Annotated[str, typer.Option(help="Name of the workload; the file's otherwise.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to record.")] = 16384,
    sequence_length: Annotated[int, typer.Option(help="Tokens of one sequence.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was recorded as JSON.")] = False,
) -> None:
    """Run text through a model and record which experts every token chose."""
    from moecc.frontend.trace import save_trace
    from moecc.integrations.routing_recorder import record

    routing = record(
        checkpoint, inputs, tokens=tokens, sequence_length=sequence_length, name=name or output.stem
    )
    save_trace(output, routing)
    tokens_seen, layers, top_k = routing.topk_ids.shape
    facts = {"tokens": tokens_seen, "layers": layers, "top_k": top_k, "experts": routing.num_experts}
    if as_json:
        typer.echo(json.dumps({"trace": str(output), **facts}))
    else:
        typer.echo(f"{output}: " + ", ".join(f"{value} {name}" for name, value in facts.items()))


@app.command("stats")
def stats_command(
    traces: Annotated[list[Path], typer.Argument(help="Traces.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Say how skewed, how structured and how local the routing of traces is."""
    from moecc.cli.tables import print_trace_stats
    from moecc.frontend.trace import load_trace
    from moecc.solvers.routing_stats import routing_stats
    from moecc.solvers.trace_metrics import locality

    routings = [load_trace(path) for path in traces]
    stats = [(routing_stats(routing), locality(routing)) for routing in routings]
    if as_json:
        typer.echo(json.dumps([asdict(structure) | asdict(local) for structure, local in stats], indent=1))
    else:
        print_trace_stats(stats)
