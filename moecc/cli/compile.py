"""moecc compile"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from moecc.errors import InputError, MoeccError

if TYPE_CHECKING:
    from moecc.frontend.spec import Target


def compile_command(
    model: Annotated[Path | None, typer.Argument(help="model.yaml", show_default=False)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")] = Path("out"),
    hf_config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json, in place of a YAML.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model known by name, in place of a YAML.")] = None,
    device: Annotated[str, typer.Option(help="With --hf-config or --preset: the device.")] = "h100-sxm",
    nodes: Annotated[int, typer.Option(help="With --hf-config or --preset.")] = 1,
    devices_per_node: Annotated[int, typer.Option(help="With --hf-config or --preset.")] = 8,
    target: Annotated[
        list[str] | None, typer.Option(help="Kernel target, repeatable; the YAML's otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile a model: placement, schedule, kernels and predictions into one folder."""
    from moecc.cli.progress import StageProgress
    from moecc.driver import compile_model
    from moecc.frontend.from_flags import spec_from_config, spec_from_preset
    from moecc.frontend.model_yaml import load_model_yaml

    given = [source for source in (model, hf_config, preset) if source is not None]
    if len(given) != 1:
        hint = "moecc compile model.yaml, or --hf-config config.json, or --preset qwen3-30b-a3b"
        raise InputError(f"{len(given)} models given, not one", where="moecc compile", hint=hint)
    if model is not None:
        spec = load_model_yaml(model)
    elif hf_config is not None:
        spec = spec_from_config(hf_config, device=device, nodes=nodes, devices_per_node=devices_per_node)
    else:
        spec = spec_from_preset(str(preset), device=device, nodes=nodes, devices_per_node=devices_per_node)
    if target:
        spec = replace(spec, targets=tuple(cast("Target", name) for name in target))
    with StageProgress() as progress:
        compiled = compile_model(spec, output, progress)
    if as_json:
        typer.echo(json.dumps(compiled.report, indent=1))
    else:
        from moecc.cli.tables import print_report

        print_report(compiled.report, output if compiled.artifact else None)
    if compiled.artifact is None:
        memory = compiled.report["memory"]
        raise MoeccError(
            f"one device needs {memory['used_bytes'] / 1e9:.1f} GB and has {memory['capacity_bytes'] / 1e9:.1f} GB",
            where=spec.source,
            hint="use more devices, or lower serving.tokens_per_device.decode or serving.context_length",
        )
