"""moecc bench"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def bench_command(
    artifact: Annotated[Path, typer.Argument(help="Folder that moecc compile wrote.", show_default=False)],
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one kernel set.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time the kernels of an artifact on this machine and set them beside the predictions."""
    from moecc.artifact import load_artifact
    from moecc.cli.tables import print_bench
    from moecc.runtime.bench import bench_artifact

    bench = bench_artifact(load_artifact(artifact), seconds=seconds)
    if as_json:
        typer.echo(json.dumps(bench.to_json()))
    else:
        print_bench(bench.to_json())
