"""moecc tune"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.layer_options import (
    DeviceOption,
    ExpertParallelOption,
    ExpertsOption,
    GatedOption,
    HiddenOption,
    IntermediateOption,
    JsonOption,
    TensorParallelOption,
    TopKOption,
)
from moecc.errors import InputError

if TYPE_CHECKING:
    from moecc.autotune.fused_moe import FusedMoeConfig


def tune_command(
    device: DeviceOption,
    hidden: HiddenOption,
    intermediate: IntermediateOption,
    experts: ExpertsOption,
    top_k: TopKOption,
    tokens: Annotated[int, typer.Option(help="Tokens that a rank sees.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float16, fp8, fp8_block, int8_w8a8, int8_w8a16 or int4_w4a16."),
    ] = "bfloat16",
    tp: TensorParallelOption = 1,
    ep: ExpertParallelOption = 1,
    gated: GatedOption = True,
    rank_only: Annotated[
        bool, typer.Option("--rank-only", help="Rank configs of vLLM's fused_moe without a device.")
    ] = False,
    top: Annotated[int, typer.Option(help="Configs to print.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Find good kernel configs for a layer."""
    from moecc.autotune.boards import find_board
    from moecc.autotune.fused_moe import FusedMoeShape
    from moecc.autotune.ranking import rank

    if not rank_only:
        raise InputError("measuring is not there yet", where="moecc tune", hint="add --rank-only")
    if top < 1:
        raise InputError(f"{top} is not positive", where="--top", hint="use 1 or more")
    shape = FusedMoeShape(
        experts=_split(experts, ep, "--ep", "experts"),
        hidden=hidden,
        intermediate=_split(intermediate, tp, "--tp", "intermediate"),
        top_k=top_k,
        tokens=-(-tokens // ep),  # of all choices 1/ep fall on this rank's experts
        dtype=dtype,
        gated=gated,
    )
    configs = rank(shape, find_board(device))[:top]
    if as_json:
        typer.echo(json.dumps({"configs": [config.as_vllm() for config in configs]}, indent=1))
        return
    _print(configs, device)


def _split(size: int, parts: int, flag: str, what: str) -> int:
    if parts < 1 or size % parts:
        message = f"{parts} does not divide {what} {size}"
        raise InputError(message, where=flag, hint=f"use a divisor of the full {what}")
    return size // parts


def _print(configs: list[FusedMoeConfig], device: str) -> None:
    from moecc.autotune.fused_moe import VLLM_NAMES
    from moecc.cli.tables import plain_table, print_titled, wide_console

    table = plain_table("place", *VLLM_NAMES.values())
    for place, config in enumerate(configs, 1):
        table.add_row(str(place), *map(str, config.as_vllm().values()))
    print_titled(wide_console(), f"Configs of vLLM's fused_moe on {device}, likely best first", table)
