"""OLMoE: softmax over all experts, top-k, normalised if `norm_topk_prob`."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {**base.KEYS, "experts": ("num_experts", "num_local_experts")}
REQUIRED = base.REQUIRED


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type olmoe (transformers OlmoeTopKRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.checked_layers(fields)
    return base.build(
        fields,
        name=name,
        family="olmoe",
        router=Router(score="softmax", normalize=fields.boolean("norm_topk_prob", False)),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields),
    )
