"""GraniteMoE: top-k of the logits, softmax over the k."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = {**base.KEYS, "experts": ("num_local_experts", "num_experts")}
REQUIRED = base.REQUIRED


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type granitemoe (transformers GraniteMoeTopKRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.checked_layers(fields)
    multiplier = fields.number("residual_multiplier", 1.0)
    scaled = (
        f"what attention and experts add to the residual stream is scaled by {multiplier:g} where it is added"
    )
    return base.build(
        fields,
        name=name,
        family="granitemoe",
        router=Router(score="softmax", select_first=True),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields),
        notes=[scaled] if multiplier != 1.0 else [],
    )
