"""moecc place"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecc.errors import MoeccError

if TYPE_CHECKING:
    from moecc.cli.place_inputs import Exports
    from moecc.cli.progress import StageProgress
    from moecc.solvers.placement import PlacementProblem
    from moecc.solvers.placement.homes import Unit
    from moecc.solvers.placement.placing import Placed
    from moecc.solvers.placement.sweep import SweepPoint
    from moecc.solvers.routing import Routing

SWEEP_SHARE = 0.25
"""Of the time limit, for the plot's sweep of caps."""


def place_command(
    traces: Annotated[
        list[str],
        typer.Argument(help="Traces, one a workload: FILE.npz or NAME=FILE.npz", show_default=False),
    ],
    devices: Annotated[int, typer.Option(help="Devices in all.")] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes that the devices are spread over.")] = 1,
    slots_per_device: Annotated[
        int | None, typer.Option(help="Experts that a device holds per layer; as few as possible otherwise.")
    ] = None,
    memory_per_device_gb: Annotated[
        list[float] | None,
        typer.Option(
            help="Memory for experts, 1e9 bytes, instead of slots: of all devices, or repeated for each."
        ),
    ] = None,
    execution: Annotated[
        str, typer.Option(help="home: tokens return after every layer; migrate: they stay where they landed.")
    ] = "home",
    objective: Annotated[str, typer.Option(help="What to minimise: traffic, load or step.")] = "traffic",
    balance: Annotated[
        str, typer.Option(help="Whose imbalance counts: workload (their mean), pooled, worst or cvar.")
    ] = "workload",
    max_imbalance: Annotated[
        float | None, typer.Option(help="Cap on the imbalance: largest device load / mean; none otherwise.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of a workload, in the order of the traces, repeatable.")
    ] = None,
    dispatch: Annotated[
        str, typer.Option(help="How the engine picks replicas: even, nearest, random or lp.")
    ] = "even",
    homes: Annotated[
        str, typer.Option(help="Where tokens are homed: random, or chosen for each sequence or token.")
    ] = "random",
    topology: Annotated[
        Path | None,
        typer.Option(help="Links: the text of nvidia-smi topo -m, or a cost matrix as .json or .csv."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The model by name: for --objective step and --export.")
    ] = None,
    hf_config: Annotated[
        Path | None, typer.Option(help="The model's config.json: for --objective step and --export.")
    ] = None,
    device: Annotated[str, typer.Option(help="With --objective step: the device.")] = "h100-sxm",
    tokens_per_device: Annotated[
        int, typer.Option(help="With --objective step: tokens of one device in a step.")
    ] = 4096,
    from_: Annotated[
        Path | None, typer.Option("--from", help="placement.json in force, to move from.", show_default=False)
    ] = None,
    max_moved_gb: Annotated[
        float | None, typer.Option(help="With --from: most expert weights to move, all layers together.")
    ] = None,
    expert_mb: Annotated[
        float | None,
        typer.Option(
            help="One expert's weights in one layer, 1e6 bytes; those of --preset or --hf-config otherwise."
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds for all solving; a quarter is kept for --leave-one-out.")
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that share independent layers.")] = 1,
    leave_one_out: Annotated[
        bool, typer.Option(help="Also solve without each workload and judge on it.")
    ] = True,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path(
        "placement.json"
    ),
    export: Annotated[
        list[str] | None, typer.Option(help="Also write an engine's format, as ENGINE:FILE, repeatable.")
    ] = None,
    dense_layer: Annotated[
        list[int] | None,
        typer.Option(help="With --export and no model: a layer without experts, repeatable."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw it, as .png or .svg, with a sweep of caps in a quarter of the time."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Solve nothing: recompute the figures of this placement.json from the traces."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Place experts on devices from routing traces: balance, traffic, and what both are worth on unseen tokens."""
    from moecc.cli import place_inputs as inputs
    from moecc.files import check_writable
    from moecc.solvers.placement import PlacementProblem

    workloads = inputs.read_workloads(traces, weight or [])
    if check is not None:
        _check(check, workloads, as_json)
        return
    for path in (output, *([plot] if plot else [])):
        check_writable(path)
    per_node = inputs.devices_per_node(devices, nodes)
    model = inputs.read_model(preset, hf_config, workloads[0])
    expert_bytes = inputs.expert_bytes(expert_mb, model)
    slots, notes = inputs.slots_that_fit(
        memory_per_device_gb or [], slots_per_device, expert_bytes, workloads[0], devices
    )
    exports = inputs.read_exports(export or [], dense_layer or [], model, workloads[0].layers)
    cost = None
    if objective == "step":
        cost, confidence = inputs.model_step_cost(
            model,
            device=device,
            nodes=nodes,
            devices=devices,
            slots=slots,
            tokens_per_device=tokens_per_device,
        )
        notes.append(f"times are predictions; {confidence}")
    choices: dict[str, Any] = {
        "execution": execution,
        "objective": objective,
        "balance": balance,
        "dispatch": dispatch,
    }
    problem = PlacementProblem(
        workloads=workloads,
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=slots,
        max_imbalance=max_imbalance,
        links=inputs.read_links(topology, devices, nodes) if topology else None,
        step_cost=cost,
        in_force=inputs.read_placement(from_) if from_ else None,
        max_moved_bytes=None if max_moved_gb is None else max_moved_gb * 1e9,
        expert_bytes=expert_bytes,
        time_limit_s=time_limit,
        seed=seed,
        workers=workers,
        **choices,
    )
    unit = inputs.read_homes(homes)
    _place(problem, output, exports, plot, leave_one_out, unit, notes, as_json)


def _place(
    problem: PlacementProblem,
    output: Path,
    exports: Exports,
    plot: Path | None,
    leave_one_out: bool,
    homes: Unit | None,
    notes: list[str],
    as_json: bool,
) -> None:
    from moecc.cli.place_tables import print_placed
    from moecc.cli.progress import StageProgress
    from moecc.files import write_atomic
    from moecc.solvers.placement.placing import place

    draw = _plotter(plot)
    share = 1 - SWEEP_SHARE if draw else 1.0
    with StageProgress() as progress:
        placed = place(
            replace(problem, time_limit_s=problem.time_limit_s * share),
            leave_one_out=leave_one_out,
            homes=homes,
            progress=progress,
        )
        write_atomic(output, placed.to_json())
        if placed.interrupted:
            typer.echo(f"interrupted: {output} holds the best placement so far", err=True)
        flags = exports.write(placed.solution.placement)
        if draw and plot:
            write_atomic(plot, draw(problem, placed, _swept(problem, placed, progress)))
    files = [output, *(path for _, path in exports.files), *([plot] if plot else [])]
    if as_json:
        typer.echo(json.dumps(_summary(placed, files, notes, flags), indent=1))
    else:
        print_placed(placed, files, notes, flags)


def _swept(problem: PlacementProblem, placed: Placed, progress: StageProgress) -> list[SweepPoint]:
    """The sweep's points, unless an interrupt asked to come to an end."""
    from moecc.solvers.placement.sweep import sweep

    if placed.interrupted:
        return []
    limit = problem.time_limit_s * SWEEP_SHARE
    return sweep(problem, start=placed.solution.placement, time_limit_s=limit, progress=progress)


def _plotter(plot: Path | None) -> Callable[[PlacementProblem, Placed, list[SweepPoint]], bytes] | None:
    """What draws into a file of that name, found before anything is solved."""
    if plot is None:
        return None
    from moecc.plots import draw_placed, image_format

    return partial(draw_placed, image_format(plot))


def _summary(placed: Placed, files: list[Path], notes: list[str], flags: list[str]) -> dict[str, Any]:
    return {
        "files": [str(path) for path in files],
        "certificate": asdict(placed.solution.certificate),
        "report": asdict(placed.report),
        "notes": notes,
        "launch": flags,
    }


def _check(path: Path, workloads: tuple[Routing, ...], as_json: bool) -> None:
    from moecc.cli.place_tables import print_recheck
    from moecc.files import read_text
    from moecc.solvers.placement.recheck import recheck

    text = read_text(path, "give a placement.json, as `moecc place -o` writes it")
    found = recheck(text, workloads, where=str(path))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        print_recheck(path, found)
    if found.wrong:
        raise MoeccError(
            f"{len(found.wrong)} of {found.figures} figures disagree with the traces",
            where=str(path),
            hint="the file was changed, or made by another version: place again",
        )
