"""The table of placement formats, and the functions that read and write by a format's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecc.engines import ascend, eplb, exflow, sglang, trtllm, vllm
from moecc.engines.files import wrong
from moecc.engines.slots import ModelPlacement, SlotTable, as_placement, why_impossible
from moecc.errors import InputError
from moecc.solvers.placement.placement import Placement


@dataclass(frozen=True)
class Format:
    """A file that an engine loads its placement from."""

    engine: str
    write: Callable[[ModelPlacement, Path], None]
    read: Callable[[Path], SlotTable]
    launch_flags: Callable[[ModelPlacement, Path], str]


FORMATS: dict[str, Format] = {
    "sglang": Format("SGLang", sglang.write, sglang.read, sglang.launch_flags),
    "vllm": Format("vLLM", vllm.write, vllm.read, vllm.launch_flags),
    "trtllm": Format("TensorRT-LLM", trtllm.write, trtllm.read, trtllm.launch_flags),
    "ascend": Format("vllm-ascend", ascend.write, ascend.read, ascend.launch_flags),
    "eplb": Format("DeepSeek EPLB", eplb.write, eplb.read, eplb.launch_flags),
    "exflow": Format("ExFlow", exflow.write, exflow.read, exflow.launch_flags),
}


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(
            f"format {name!r} is unknown", where="export", hint=f"use one of {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def export_placement(
    placement: Placement, layers_total: int, moe_layers: Sequence[int], format: str, path: Path
) -> str:
    """Write a placement as an engine reads it; returns the flags that launch the engine with it.

    layers_total: layers of the model, dense ones too; moe_layers: the model's layer of every row of the placement.
    Errors: InputError with the reason where the engine cannot do what the placement asks; MoeccError where the file
    cannot be written.
    """
    chosen, path = format_named(format), Path(path)
    model = ModelPlacement(placement=placement, layers_total=layers_total, moe_layers=tuple(moe_layers))
    rows = placement.physical_to_logical.astype("int64")
    if problem := why_impossible(rows, placement.num_experts, placement.devices):
        reason, hint = problem
        wrong(path, f"{chosen.engine} cannot load it: {reason}", hint)
    chosen.write(model, path)
    return chosen.launch_flags(model, path)


def read_placement(
    path: Path,
    format: str,
    *,
    devices: int | None = None,
    devices_per_node: int | None = None,
    num_experts: int | None = None,
    moe_layers: Sequence[int] | None = None,
) -> Placement:
    """The placement in an engine's file. Arguments say what a format does not hold, and are compared with what it does.

    moe_layers picks the rows of layers with experts where the file has others too (SGLang), or names them.
    Errors: InputError, one line with the file, the place in it and what is wrong.
    """
    chosen, path = format_named(format), Path(path)
    table = chosen.read(path)
    if format == "exflow":
        table = exflow.split_layers(table, path, num_experts)
    return as_placement(
        table,
        path,
        devices=devices,
        devices_per_node=devices_per_node,
        num_experts=num_experts,
        moe_layers=moe_layers,
    )
