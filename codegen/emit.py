"""Writes one MoE layer as a standalone Python module: its kernels, its frozen configs, its launcher."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.codegen.config import KernelConfigs, LayerShape


def emit_module(shape: LayerShape, configs: Mapping[str, KernelConfigs], name: str) -> str:
    """Source text of a module that imports only the standard library, torch and triton.

    configs: target name (a compiled target or `interpret`) -> configs. The module offers
    `forward(x, weights, *, residual=None) -> [tokens, hidden]`,
    `route(x, weights) -> (topk_ids int32 [tokens, top_k + shared], topk_weights float32 likewise)`,
    `experts(x, topk_ids, topk_weights, weights, *, residual=None)` for a routing made elsewhere (an id outside
    [0, experts) means that another device computes it), and `workspace_bytes(tokens)`. `weights` maps `gate`,
    `gate_up`, `down` and, where the layer has them, `router_bias`, `correction_bias`, `gate_up_bias`,
    `down_bias` to tensors. The text is a function of the arguments alone.
    """
    raise NotImplementedError
