"""DeepSeek-V2: softmax scores, the best groups by their best expert if asked, weights scaled but not normalised."""

from __future__ import annotations

from moecc.frontend.families import base, deepseek_v3
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import ModelSpec
from moecc.ir.semantics import Router

KEYS = deepseek_v3.KEYS
GROUPED = "group_limited_greedy"
REQUIRED = (
    *base.REQUIRED,
    "dense_intermediate_size",
    "shared_experts.count",
    "router.scale",
    "first_k_dense_replace",
    "attention.kv_lora_rank",
    "attention.qk_rope_head_dim",
    "attention.qk_nope_head_dim",
    "attention.v_head_dim",
)


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type deepseek_v2 (transformers DeepseekV2TopkRouter, DeepseekV2Moe)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.require_text(fields, "scoring_func", "softmax")
    base.refuse_shared_bias(fields, "mlp_bias")
    return base.build(
        fields,
        name=name,
        family="deepseek_v2",
        dense_layers=deepseek_v3.dense_layers(fields),
        dense_intermediate_size=fields.integer("dense_intermediate_size"),
        router=_router(fields),
        activation=base.glu_activation(fields),
        attention=deepseek_v3.attention(fields),
        shared_experts=deepseek_v3.shared_experts(fields),
    )


def _router(fields: Fields) -> Router:
    """transformers ignores `norm_topk_prob` here; a checkpoint that sets it means another router than this one."""
    if fields.boolean("router.normalize", False):
        what, hint = "true is not what transformers' DeepSeek-V2 computes", "false is supported"
        raise fields.error("router.normalize", what, hint)
    scale = fields.number("router.scale", 1.0)
    method = fields.text("topk_method", "greedy")
    if method == "greedy":
        return Router(score="softmax", scale=scale)
    if method != GROUPED:
        raise fields.error("topk_method", f"'{method}' is not supported", f"greedy and {GROUPED} are")
    fields.require("router.groups", "router.top_groups")
    return Router(
        score="softmax",
        groups=fields.integer("router.groups"),
        top_groups=fields.integer("router.top_groups"),
        group_score="max",
        scale=scale,
    )
