"""MiniMax-M2: sigmoid scores, a correction bias for selection only, always normalised."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {**base.KEYS, "experts": ("num_local_experts", "num_experts")}
REQUIRED = (*base.REQUIRED, "attention.kv_heads", "attention.head_dim")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type minimax_m2 (transformers MiniMaxM2TopKRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.checked_layers(fields)
    base.require_text(fields, "scoring_func", "sigmoid")
    return base.build(
        fields,
        name=name,
        family="minimax_m2",
        router=Router(score="sigmoid", selection_bias=True, normalize=True),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields),
        notes=base.prediction_notes(fields, "num_mtp_modules"),
    )
