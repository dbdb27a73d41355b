"""What a layer's table means for each kernel of the backward pass: pure Python, shared by compiler and launcher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moecc.codegen.frozen import FUSED_BLOCK_T, Config, Constants, Layer

# No function between the GEMMs: the caller's own stands there.
IDENTITY: Mapping[str, Any] = {
    "ACTIVATION": "identity",
    "GATED": False,
    "ALPHA": 0.0,
    "LIMIT": 0.0,
    "INTERLEAVED": False,
}

KEPT = ("grad_pre", "h", "grad_weights")


def backward_constants(
    layer: Layer,
    config: Config,
    *,
    slots: int,
    experts: int,
    backend: str,
    keep: Collection[str] = KEPT,
    activation: Mapping[str, Any] | None = None,
) -> dict[str, Constants]:
    """Every backward kernel's constexpr arguments and launch options, for `slots` assignments a token.

    keep: what grad_pre stores, among `KEPT`. activation: in place of the layer's own. backend: as in
    `kernel_constants`.
    """
    common = {"TOP_K": slots, "BACKEND": backend}
    sizes = {"HIDDEN": layer.hidden, "INTERMEDIATE": layer.intermediate}
    grad_pre = {
        **layer.layout,
        **(layer.activation if activation is None else activation),
        "HAS_EXPERT_BIAS": layer.has_expert_bias,
        **{f"KEEP_{name.upper()}": name in keep for name in KEPT},
    }
    return {
        "grad_pre": {**sizes, **common, **grad_pre, **config["grad_pre"]},
        "grad_x": {**common, **_grad_x(layer, experts), **config["grad_x"]},
        "grad_gate_up": {**common, **_outer(layer, layer.columns, layer.hidden), **config["grad_gate_up"]},
        "grad_down": {
            **common,
            **_outer(layer, layer.hidden, layer.intermediate, inputs_by_token=False),
            **config["grad_down"],
        },
        "grad_gate_up_bias": {**common, "N": layer.columns, "BY_TOKEN": False, **config["grad_bias"]},
        "grad_down_bias": {**common, "N": layer.hidden, "BY_TOKEN": True, **config["grad_bias"]},
    }


def _grad_x(layer: Layer, experts: int) -> Constants:
    """The down kernel on gate_up: its inputs are our outputs, so its transposed layout is our natural one."""
    return {
        "HIDDEN": layer.hidden,
        "INTERMEDIATE": layer.columns,
        "NUM_EXPERTS": experts,
        "TRANSPOSED": not layer.layout["TRANSPOSED"],
        "HAS_EXPERT_BIAS": False,
        "WEIGHTED": False,
        "HAS_RESIDUAL": False,
        "FUSE_COMBINE": False,
        "COMBINE_T": FUSED_BLOCK_T,
    }


def _outer(layer: Layer, outputs: int, inputs: int, *, inputs_by_token: bool = True) -> Constants:
    """The gradient of weights [outputs, inputs] as they lie: its left factor is the one that runs over its rows."""
    if layer.layout["TRANSPOSED"]:
        return {"M": inputs, "N": outputs, "LEFT_BY_TOKEN": inputs_by_token}
    return {"M": outputs, "N": inputs, "LEFT_BY_TOKEN": not inputs_by_token}
