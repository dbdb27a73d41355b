"""PhiMoE (Phi-3.5-MoE): sparsemixer, which takes two experts one after the other."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {
    **base.KEYS,
    "experts": ("num_local_experts", "num_experts"),
    "router.jitter": ("router_jitter_noise",),
}
REQUIRED = (*base.REQUIRED, "attention.kv_heads")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type phimoe (transformers PhimoeTopKRouter, sparsemixer)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    layers = base.checked_layers(fields)
    top_k = fields.integer("top_k")
    if top_k != 2:
        raise fields.error("top_k", f"{top_k} is not what sparsemixer takes", "it takes 2 experts")
    return base.build(
        fields,
        name=name,
        family="phimoe",
        router=Router(score="sparsemixer", jitter=fields.number("router.jitter", 0.01)),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(
            fields, sliding_window=fields.optional_integer("sliding_window"), window_layers=layers
        ),
    )
