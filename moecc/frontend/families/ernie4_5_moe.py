"""Ernie 4.5: softmax scores, a correction bias for selection only, a floor under the sum that normalises."""

from __future__ import annotations

from moecc.frontend.families import base, deepseek_v3
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {
    **base.KEYS,
    "experts": ("moe_num_experts", "num_experts"),
    "top_k": ("moe_k", "num_experts_per_tok"),
    "intermediate_size": ("moe_intermediate_size",),
    "dense_intermediate_size": ("intermediate_size",),
    "shared_experts.count": ("moe_num_shared_experts",),
    "router.norm_min": ("moe_norm_min",),
}
REQUIRED = (*base.REQUIRED, "shared_experts.count", "attention.kv_heads")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type ernie4_5_moe (transformers Ernie4_5_MoeTopKRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.refuse_shared_bias(fields, "use_bias")
    dense = _dense_layers(fields)
    if dense:
        fields.require("dense_intermediate_size")
    return base.build(
        fields,
        name=name,
        family="ernie4_5_moe",
        dense_layers=dense,
        dense_intermediate_size=fields.optional_integer("dense_intermediate_size"),
        router=Router(
            score="softmax",
            selection_bias=True,
            normalize=True,
            norm_min=fields.number("router.norm_min", 1e-12),
        ),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields),
        shared_experts=deepseek_v3.shared_experts(fields),
        ties_embeddings=True,
    )


def _dense_layers(fields: Fields) -> list[int]:
    """Every `moe_layer_interval`-th layer from start to end has experts; an end of -1 is the last layer."""
    layers = base.checked_layers(fields)
    first = fields.integer("moe_layer_start_index", 1, minimum=0)
    last = fields.integer("moe_layer_end_index", -1, minimum=-1)
    every = fields.integer("moe_layer_interval", 1)
    last = len(layers) - 1 if last == -1 else last
    return [layer for layer in layers if (layer + 1) % every or not first <= layer <= last]
