"""DeepSeek-V3, DeepSeek-R1 and Kimi-K2: sigmoid scores, a correction bias for selection only, groups by top-2 sum."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import Attention, ModelSpec, SharedExperts
from moecc.ir.semantics import Router

KEYS = {
    **base.KEYS,
    "experts": ("n_routed_experts", "num_local_experts"),
    "intermediate_size": ("moe_intermediate_size",),
    "dense_intermediate_size": ("intermediate_size",),
    "shared_experts.count": ("n_shared_experts",),
    "router.groups": ("n_group",),
    "router.top_groups": ("topk_group",),
    "router.scale": ("routed_scaling_factor",),
    "router.normalize": ("norm_topk_prob",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.qk_rope_head_dim": ("qk_rope_head_dim",),
    "attention.qk_nope_head_dim": ("qk_nope_head_dim",),
    "attention.v_head_dim": ("v_head_dim",),
}
REQUIRED = (
    *base.REQUIRED,
    "dense_intermediate_size",
    "shared_experts.count",
    "router.groups",
    "router.top_groups",
    "router.scale",
    "router.normalize",
    "first_k_dense_replace",
    "attention.kv_lora_rank",
    "attention.qk_rope_head_dim",
    "attention.qk_nope_head_dim",
    "attention.v_head_dim",
)


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type deepseek_v3 or kimi_k2 (transformers DeepseekV3TopkRouter)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        base.require_text(fields, key, known)
    return base.build(
        fields,
        name=name,
        family="deepseek_v3",
        dense_layers=dense_layers(fields),
        dense_intermediate_size=fields.integer("dense_intermediate_size"),
        router=router(fields),
        activation=base.glu_activation(fields),
        attention=attention(fields),
        shared_experts=shared_experts(fields),
        notes=base.prediction_notes(fields, "num_nextn_predict_layers"),
    )


def dense_layers(fields: Fields) -> list[int]:
    """The first `first_k_dense_replace`, and those that `moe_layer_freq` leaves out."""
    first = fields.integer("first_k_dense_replace", minimum=0)
    every = fields.integer("moe_layer_freq", 1)
    return [layer for layer in base.checked_layers(fields) if layer < first or layer % every]


def shared_experts(fields: Fields) -> SharedExperts:
    """One MLP that is `n_shared_experts` times as wide as an expert, which is so many experts."""
    count = fields.integer("shared_experts.count", minimum=0)
    return SharedExperts(count=count, intermediate_size=fields.integer("intermediate_size") if count else 0)


def router(fields: Fields) -> Router:
    """Sigmoid scores, the best groups by their two best, a bias that only selects, weights with sum 1 if asked."""
    normalize = fields.boolean("router.normalize", True)
    return Router(
        score="sigmoid",
        selection_bias=True,
        groups=fields.integer("router.groups"),
        top_groups=fields.integer("router.top_groups"),
        group_score="top2_sum",
        normalize=normalize,
        norm_eps=1e-20 if normalize else 0.0,
        scale=fields.number("router.scale", 1.0),
    )


def attention(fields: Fields) -> Attention:
    """Multi-head latent attention."""
    heads = fields.integer("attention.heads")
    rope = fields.integer("attention.qk_rope_head_dim")
    nope = fields.integer("attention.qk_nope_head_dim")
    return Attention(
        kind="mla",
        heads=heads,
        kv_heads=fields.integer("attention.kv_heads", heads),
        head_dim=nope + rope,
        kv_lora_rank=fields.integer("attention.kv_lora_rank"),
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=fields.integer("attention.v_head_dim"),
        q_lora_rank=fields.optional_integer("attention.q_lora_rank"),
    )
