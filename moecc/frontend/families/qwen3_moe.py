"""Qwen3-MoE: softmax over all experts, top-k, normalised if `norm_topk_prob`; some layers may be dense."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {
    **base.KEYS,
    "experts": ("num_experts", "num_local_experts"),  # transformers 5 writes num_local_experts
    "intermediate_size": ("moe_intermediate_size",),
    "dense_intermediate_size": ("intermediate_size",),
}
REQUIRED = base.REQUIRED


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type qwen3_moe (transformers Qwen3MoeTopKRouter, Qwen3MoeDecoderLayer)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    layers = base.checked_layers(fields)
    dense = dense_layers(fields)
    windowed = fields.boolean("use_sliding_window", False)
    return base.build(
        fields,
        name=name,
        family="qwen3_moe",
        dense_layers=dense,
        dense_intermediate_size=fields.optional_integer("dense_intermediate_size"),
        router=Router(score="softmax", normalize=fields.boolean("norm_topk_prob", False)),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(
            fields,
            sliding_window=fields.optional_integer("sliding_window") if windowed else None,
            window_layers=layers,
        ),
    )


def dense_layers(fields: Fields) -> list[int]:
    """Those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th; their width is required."""
    step = fields.integer("decoder_sparse_step", 1)
    only = fields.listed("mlp_only_layers", int, ())
    dense = [layer for layer in base.checked_layers(fields) if layer in only or (layer + 1) % step]
    if dense:
        fields.require("dense_intermediate_size")
    return dense
