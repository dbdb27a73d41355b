"""Qwen2-MoE (Qwen1.5-MoE): softmax over all experts, top-k; one wide shared expert behind a sigmoid gate."""

from __future__ import annotations

from moecc.frontend.families import base, qwen3_moe
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec, SharedExperts
from moecc.ir.semantics import Router

KEYS = {**qwen3_moe.KEYS, "shared_experts.intermediate_size": ("shared_expert_intermediate_size",)}
REQUIRED = (*base.REQUIRED, "shared_experts.intermediate_size", "attention.kv_heads")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type qwen2_moe (transformers Qwen2MoeSparseMoeBlock)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    layers = base.checked_layers(fields)
    dense = qwen3_moe.dense_layers(fields)
    windowed = fields.boolean("use_sliding_window", False)
    last_window = fields.integer("max_window_layers", 28, minimum=0)
    return base.build(
        fields,
        name=name,
        family="qwen2_moe",
        dense_layers=dense,
        dense_intermediate_size=fields.optional_integer("dense_intermediate_size"),
        router=Router(score="softmax", normalize=fields.boolean("norm_topk_prob", False)),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(
            fields,
            sliding_window=fields.integer("sliding_window", 4096) if windowed else None,
            window_layers=[layer for layer in layers if layer % 2 == 0 and layer < last_window],
        ),
        shared_experts=SharedExperts(
            count=1, intermediate_size=fields.integer("shared_experts.intermediate_size"), gated=True
        ),
    )
