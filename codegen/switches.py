"""From a layer shape and configs to the plain tables that kernels, launcher and emitted modules share."""

from __future__ import annotations

from typing import Any

from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.frozen import Layer


def freeze_layer(shape: LayerShape) -> Layer:
    """The layer's table: everything about the shape that kernels are specialised for, but not `tokens`."""
    router, activation = shape.router, shape.activation
    return Layer(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        experts=shape.experts,
        shared=shape.shared,
        top_k=shape.top_k,
        dtype=shape.dtype,
        has_expert_bias=shape.has_expert_bias,
        router={
            "SCORE": router.score,
            "SELECT_FIRST": router.select_first,
            "SELECTION_BIAS": router.selection_bias and not router.select_first,
            "GROUPS": router.groups,
            "TOP_GROUPS": router.top_groups,
            "GROUP_SCORE": router.group_score,
            "NORMALIZE": router.normalize,
            "NORM_EPS": router.norm_eps,
            "NORM_MIN": router.norm_min,
            "SCALE": router.scale,
            "JITTER": router.jitter,
            "HAS_ROUTER_BIAS": shape.has_router_bias,
        },
        activation={
            "ACTIVATION": activation.function,
            "GATED": activation.gated,
            "ALPHA": activation.alpha,
            "LIMIT": activation.limit,
        },
        layout={"TRANSPOSED": shape.transposed, "INTERLEAVED": shape.interleaved},
    )


def freeze_configs(configs: KernelConfigs) -> dict[str, dict[str, Any]]:
    """Kernel -> block sizes (upper case, as the kernels name them) and launch options (lower case)."""

    def table(config: object) -> dict[str, Any]:
        options = ("num_warps", "num_stages")
        return {name if name in options else name.upper(): value for name, value in vars(config).items()}

    return {name: table(config) for name, config in configs.by_kernel.items()}
