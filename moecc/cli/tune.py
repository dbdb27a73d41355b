"""moecc tune"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.layer_options import (
    ExpertParallelOption,
    GatedOption,
    JsonOption,
    TensorParallelOption,
    token_counts,
)
from moecc.errors import InputError

if TYPE_CHECKING:
    from moecc.autotune.fused_moe import FusedMoeConfig
    from moecc.cli.tune_layers import LayerSizes


def tune_command(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="Folder that moecc compile wrote: all its layers.", show_default=False),
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Intermediate size, the full one.")] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts, all of them.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts of a token.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens that a rank sees, several apart by commas.  [1]")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16 or float32; to rank also fp8, fp8_block, int8_w8a8, int8_w8a16, int4_w4a16."
        ),
    ] = "bfloat16",
    tp: TensorParallelOption = 1,
    ep: ExpertParallelOption = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Routing to measure with; a uniform one otherwise.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Configs to measure, those that are known included.")] = 32,
    time_limit: Annotated[float | None, typer.Option(help="Seconds in all.")] = None,
    rank_only: Annotated[
        bool, typer.Option("--rank-only", help="Rank configs of vLLM's fused_moe without a device.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="To rank for: h100-sxm, …, a device's YAML file.")
    ] = None,
    gated: GatedOption = True,
    top: Annotated[int, typer.Option(help="Configs to print of a ranking.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Measure good kernel configs for layers on this machine and keep them, or rank them without a device."""
    from moecc.cli.tune_layers import Limits, artifact_shapes, flag_shapes, tune_layers

    sizes = {"--hidden": hidden, "--intermediate": intermediate, "--experts": experts, "--top-k": top_k}
    if not rank_only:
        hint = "leave it out, or rank without a device: --rank-only"
        for flag, is_given in (("--device", device is not None), ("--no-gated", not gated)):
            if is_given:
                raise InputError("is for rankings only", where=flag, hint=hint)
    if artifact is not None and not rank_only:
        flags = {**sizes, "--tp": tp, "--ep": ep, "--dtype": dtype}
        if given := [name for name, value in flags.items() if value not in (None, 1, "bfloat16")]:
            raise InputError("an artifact has its sizes", where=given[0], hint="give one of the two")
        shapes = artifact_shapes(artifact, token_counts(tokens) if tokens else None)
    else:
        layer = _layer(sizes, tp, ep)
        counts = token_counts(tokens or "1")
        if rank_only:
            _rank(layer, counts, dtype=dtype, device=device, gated=gated, top=top, as_json=as_json)
            return
        shapes = flag_shapes(layer, counts, dtype)
    tune_layers(shapes, Limits(trials=trials, time_limit_s=time_limit), trace=trace, as_json=as_json)


def _layer(sizes: Mapping[str, int | None], tp: int, ep: int) -> LayerSizes:
    """The share of one rank. InputError for a size that is missing or does not divide."""
    from moecc.cli.tune_layers import LayerSizes

    if missing := [name for name, size in sizes.items() if size is None]:
        raise InputError("is missing", where=missing[0], hint="give the layer's four sizes, or an artifact")
    hidden, intermediate, experts, top_k = (size or 0 for size in sizes.values())
    return LayerSizes(
        hidden=hidden,
        intermediate=_split(intermediate, tp, "--tp", "intermediate"),
        experts=experts,
        slots=_split(experts, ep, "--ep", "experts"),
        top_k=top_k,
    )


def _rank(
    layer: LayerSizes,
    counts: list[int],
    *,
    dtype: str,
    device: str | None,
    gated: bool,
    top: int,
    as_json: bool,
) -> None:
    from moecc.autotune.boards import find_board
    from moecc.autotune.fused_moe import FusedMoeShape
    from moecc.autotune.ranking import rank

    if device is None:
        raise InputError("is missing", where="--device", hint="a ranking needs to know for which device")
    if len(counts) > 1:
        raise InputError(f"{len(counts)} counts to rank for", where="--tokens", hint="give one")
    if top < 1:
        raise InputError(f"{top} is not positive", where="--top", hint="use 1 or more")
    shape = FusedMoeShape(
        experts=layer.slots,
        hidden=layer.hidden,
        intermediate=layer.intermediate,
        top_k=layer.top_k,
        tokens=layer.tokens_here(counts[0]),
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
