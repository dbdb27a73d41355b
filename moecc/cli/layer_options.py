"""The options with which predict and tune describe a layer and its load."""

from __future__ import annotations

from typing import Annotated

import typer

from moecc.errors import InputError

DeviceOption = Annotated[str, typer.Option(help="h100-sxm, …, a device's YAML file.", show_default=False)]
HiddenOption = Annotated[int, typer.Option(help="Hidden size.", show_default=False)]
IntermediateOption = Annotated[
    int, typer.Option(help="Intermediate size of an expert, the full one.", show_default=False)
]
ExpertsOption = Annotated[int, typer.Option(help="Routed experts, all of them.", show_default=False)]
TopKOption = Annotated[int, typer.Option("--top-k", help="Experts of a token.", show_default=False)]
TensorParallelOption = Annotated[int, typer.Option("--tp", help="Ranks that share each expert's columns.")]
ExpertParallelOption = Annotated[int, typer.Option("--ep", help="Ranks that share the experts.")]
GatedOption = Annotated[
    bool, typer.Option("--gated/--no-gated", help="Three matrices an expert (gate, up, down), or two.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def token_counts(text: str) -> list[int]:
    """`1,16,256` as numbers. InputError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or not 0 < int(part) < 1 << 31]
    if wrong:
        hint = "give counts of 1 or more, apart by commas: 1,16,256"
        raise InputError(f"{wrong[0]!r} is no count of tokens", where="--tokens", hint=hint)
    return [int(part) for part in parts]
