"""gpt-oss: top-k of the logits, softmax over the k; biases on router and experts; clamped SwiGLU."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Activation, Router

KEYS = {
    **base.KEYS,
    "experts": ("num_local_experts", "num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token"),
}
REQUIRED = base.REQUIRED


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type gpt_oss (transformers GptOssTopKRouter, GptOssExperts)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    layers = base.checked_layers(fields)
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    kinds = fields.listed("layer_types", str, alternating)
    if len(kinds) != len(layers):
        raise fields.error(
            "layer_types", f"has {len(kinds)} items for {len(layers)} layers", "one for each layer"
        )
    return base.build(
        fields,
        name=name,
        family="gpt_oss",
        router=Router(score="softmax", select_first=True),
        router_bias=True,
        expert_bias=True,
        activation=Activation(
            kind="clamped_swiglu",
            alpha=fields.number("swiglu_alpha", 1.702),
            limit=fields.number("swiglu_limit", 7.0),
        ),
        attention=base.gqa_attention(
            fields,
            sliding_window=fields.optional_integer("sliding_window"),
            window_layers=[layer for layer in layers if kinds[layer] == "sliding_attention"],
        ),
    )
