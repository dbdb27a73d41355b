"""moecc compile"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from moecc.frontend.spec import Target


def compile_command(
    model: Annotated[Path | None, typer.Argument(help="model.yaml", show_default=False)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")] = Path("out"),
    hf_config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json, in place of a YAML.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model known by name, in place of a YAML.")] = None,
    device: Annotated[str | None, typer.Option(help="Without a YAML: the device.  [h100-sxm]")] = None,
    nodes: Annotated[int | None, typer.Option(help="Without a YAML: nodes.  [1]")] = None,
    devices_per_node: Annotated[
        int | None, typer.Option(help="Without a YAML: devices of a node.  [8]")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Kernel target, repeatable; the YAML's otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile a model: placement, schedule, kernels and predictions into one folder."""
    from moecc.cli.progress import StageProgress
    from moecc.driver import compile_model
    from moecc.frontend.from_flags import spec_of

    spec = spec_of(
        model=model,
        hf_config=hf_config,
        preset=preset,
        device=device,
        nodes=nodes,
        devices_per_node=devices_per_node,
    )
    if target:
        targets = tuple(cast("Target", name) for name in target)
        spec = replace(spec, targets=targets, locations={**spec.locations, "targets": "--target"})
    with StageProgress() as progress:
        compiled = compile_model(spec, output, progress)
    if as_json:
        typer.echo(json.dumps(compiled.report, indent=1))
    else:
        from moecc.cli.tables import print_report

        print_report(compiled.report, output)
