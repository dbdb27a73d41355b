"""GLM-4.5 and GLM-4.6: DeepSeek-V3's router and shared experts with grouped-query attention."""

from __future__ import annotations

from moecc.frontend.families import base, deepseek_v3
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec

KEYS = deepseek_v3.KEYS
REQUIRED = (
    *base.REQUIRED,
    "dense_intermediate_size",
    "shared_experts.count",
    "router.groups",
    "router.top_groups",
    "router.scale",
    "router.normalize",
    "first_k_dense_replace",
    "attention.kv_heads",
)


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type glm4_moe (transformers Glm4MoeTopkRouter, Glm4MoeMoE)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    return base.build(
        fields,
        name=name,
        family="glm4_moe",
        dense_layers=deepseek_v3.dense_layers(fields),
        dense_intermediate_size=fields.integer("dense_intermediate_size"),
        router=deepseek_v3.router(fields),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields),
        shared_experts=deepseek_v3.shared_experts(fields),
        notes=base.prediction_notes(fields, "num_nextn_predict_layers"),
    )
