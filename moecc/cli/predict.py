"""moecc predict"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    token_counts,
)

if TYPE_CHECKING:
    from moecc.hardware import DeviceSpec
    from moecc.hardware.routed_layer import Kernel, RoutedLayer


def predict_command(
    device: DeviceOption,
    hidden: HiddenOption,
    intermediate: IntermediateOption,
    experts: ExpertsOption,
    top_k: TopKOption,
    tokens: Annotated[str, typer.Option(help="Tokens that a rank sees, several apart by commas.")] = "1",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, fp8 or fp8_block.")] = "bfloat16",
    tp: TensorParallelOption = 1,
    ep: ExpertParallelOption = 1,
    gated: GatedOption = True,
    kernel: Annotated[str, typer.Option(help="vllm: its Triton fused_moe; moecc: moecc's own.")] = "vllm",
    routing: Annotated[str, typer.Option(help="balanced, or power_law_1.2 and the like.")] = "balanced",
    as_json: JsonOption = False,
) -> None:
    """Predict the time of one layer's routed experts on one rank, from logits to combined tokens."""
    from moecc.hardware import load_device
    from moecc.hardware.routed_layer import (
        RoutedLayer,
        held_out_error_pct,
        layer_latency_us,
        why_uncalibrated,
    )

    spec = load_device(device)
    layer = RoutedLayer(
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        top_k=top_k,
        dtype=dtype,
        gated=gated,
        tp=tp,
        ep=ep,
        routing=routing,
        kernel=cast("Kernel", kernel),
    )
    error = held_out_error_pct(layer, spec)
    rows = [
        {"tokens": count, "latency_us": round(layer_latency_us(layer, count, spec), 2), "error_pct": error}
        for count in token_counts(tokens)
    ]
    note = why_uncalibrated(layer, spec)
    if as_json:
        typer.echo(json.dumps({"predictions": rows, "notes": [note] if note else []}, indent=1))
        return
    _print(layer, spec, rows, note)


def _print(layer: RoutedLayer, spec: DeviceSpec, rows: list[dict[str, Any]], note: str | None) -> None:
    from moecc.cli.tables import plain_table, print_titled, wide_console

    table = plain_table("tokens", "latency us", "median held-out error %")
    for row in rows:
        error = "-" if row["error_pct"] is None else f"{row['error_pct']:g}"
        table.add_row(str(row["tokens"]), f"{row['latency_us']:.1f}", error)
    vllm = "vLLM's CPU ops" if spec.target == "x86" else "vLLM's Triton fused_moe"
    kernel = vllm if layer.kernel == "vllm" else "moecc's kernels"
    print_titled(wide_console(), f"{kernel} on {spec.name}, {layer.routing} routing, predicted", table)
    if note:
        typer.echo(f"note: {note}", err=True)
