"""Mixtral: softmax over all experts, top-k, always normalised."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {**base.KEYS, "experts": ("num_local_experts", "num_experts")}
REQUIRED = base.REQUIRED


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type mixtral (transformers MixtralTopKRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    layers = base.checked_layers(fields)
    return base.build(
        fields,
        name=name,
        family="mixtral",
        router=Router(score="softmax", normalize=True),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(
            fields, sliding_window=fields.optional_integer("sliding_window"), window_layers=layers
        ),
    )
