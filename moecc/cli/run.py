"""moecc run"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moecc.errors import MoeccError


def run_command(
    artifact: Annotated[Path, typer.Argument(help="Folder that moecc compile wrote.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 16,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of a local Hugging Face checkpoint; random weights otherwise."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Index of the layer in the model; the first with experts otherwise.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with a float64 reference.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the input, and of random weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a layer of an artifact with its own kernels on the best device at hand."""
    from moecc.artifact import load_artifact
    from moecc.runtime.run import run_artifact

    result = run_artifact(
        load_artifact(artifact), tokens=tokens, check=check, seed=seed, layer=layer, weights=weights
    )
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        ranks = f" on {result.devices} ranks in turn" if result.devices > 1 else ""
        where = {"interpret": "Triton's interpreter on the host", "x86": "native on the CPU"}.get(
            result.backend, result.device
        )
        if weights is not None:
            typer.echo(f"weights: layer {result.layer} of {result.weights}")
        typer.echo(f"{result.function}: {result.tokens} tokens{ranks}, {result.time_ms:.1f} ms ({where})")
        typer.echo(f"configs: {result.configs}")
    if result.passed is None or as_json:
        _fail_unless(result.passed)
        return
    typer.echo(
        f"relative error {result.relative_error:.2e} (tolerance {result.tolerance:.0e}), "
        f"largest {result.max_abs_error:.2e}, routing {result.selection_error:.1e}: "
        f"{'ok' if result.passed else 'WRONG'}"
    )
    _fail_unless(result.passed)


def _fail_unless(passed: bool | None) -> None:
    if passed is False:
        raise MoeccError(
            "the kernels disagree with the reference", hint="report the artifact's manifest.json"
        )
