"""moecc trace"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moecc.solvers.routing import Routing

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
    facts = _facts(routing)
    if as_json:
        typer.echo(json.dumps({"trace": str(output), **facts}))
    else:
        typer.echo(f"{output}: " + ", ".join(f"{value} {name}" for name, value in facts.items()))


@app.command("convert")
def convert_command(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="SGLang per_token dumps, vLLM routed experts, traces.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .npz to write.")],
    num_experts: Annotated[
        int | None, typer.Option(help="Experts of the model, where a dump does not say.", min=1)
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the workload; the file's otherwise.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was converted as JSON.")] = False,
) -> None:
    """Read routing that inference engines recorded into one trace; what a file is, its content says."""
    from moecc.engines import convert
    from moecc.frontend.trace import save_trace

    found = convert(inputs, num_experts=num_experts, name=name or output.stem)
    save_trace(output, found.routing)
    facts = _facts(found.routing)
    facts["sequences"] = len(set(found.routing.sequence_ids.tolist()))
    if as_json:
        typer.echo(json.dumps({"trace": str(output), **facts, "notes": found.notes}))
        return
    typer.echo(f"{output}: " + ", ".join(f"{value} {name}" for name, value in facts.items()))
    for note in found.notes:
        typer.echo(f"note: {note}")


def _facts(routing: Routing) -> dict[str, int]:
    tokens, layers, top_k = routing.topk_ids.shape
    return {"tokens": tokens, "layers": layers, "top_k": top_k, "experts": routing.num_experts}


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
