"""Nemotron-H: every layer is one of Mamba-2, attention, MLP or experts; no gates; DeepSeek-V3's router."""

from __future__ import annotations

from typing import cast, get_args

from moecc.frontend.checks import MAX_LAYERS
from moecc.frontend.families import base, deepseek_v3
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import DType, Mamba, ModelSpec, SharedExperts
from moecc.ir.semantics import Activation, ActivationKind

KEYS = {
    **deepseek_v3.KEYS,
    "activation": ("mlp_hidden_act",),
    "layer_types": ("layers_block_type", "layer_types"),
    "shared_experts.intermediate_size": ("moe_shared_expert_intermediate_size",),
    "mamba.groups": ("n_groups", "mamba_n_groups"),
    "mamba.window": ("conv_kernel", "mamba_d_conv"),
    "mamba.state_dtype": ("mamba_ssm_cache_dtype",),
}
REQUIRED = (
    *(name for name in base.REQUIRED if name != "layers"),
    "attention.kv_heads",
    "attention.head_dim",
    "router.groups",
    "router.top_groups",
    "router.scale",
    "router.normalize",
    "shared_experts.intermediate_size",
)
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NAMES = {"linear_attention": "mamba", "full_attention": "attention"}  # as transformers 5 calls them
WITHOUT_GATE = ("relu2", "relu", "silu", "gelu")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type nemotron_h (transformers NemotronHMoE, NemotronHBlock)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    base.refuse_shared_bias(fields, "mlp_bias")
    if fields.get("moe_latent_size") is not None:
        what = "puts experts between two projections of their own, which is not supported"
        raise fields.error("moe_latent_size", what, "null is supported")
    kinds = _layer_kinds(fields)
    at = {kind: [layer for layer, this in enumerate(kinds) if this == kind] for kind in PATTERN.values()}
    if at["mlp"]:
        fields.require("dense_intermediate_size")
    return base.build(
        fields,
        name=name,
        family="nemotron_h",
        layers=len(kinds),
        moe_layers=at["moe"],
        dense_layers=at["mlp"],
        dense_intermediate_size=fields.optional_integer("dense_intermediate_size"),
        router=deepseek_v3.router(fields),
        activation=_activation(fields),
        attention=base.gqa_attention(fields, layers=at["attention"]),
        mamba=_mamba(fields, at["mamba"]),
        shared_experts=_shared_experts(fields),
        notes=base.prediction_notes(fields, "num_nextn_predict_layers"),
    )


def _layer_kinds(fields: Fields) -> list[str]:
    """One of PATTERN's kinds for every layer, from the list of transformers 5 or the older pattern of letters."""
    named = fields.get("layer_types") is not None
    key = "layer_types" if named else "hybrid_override_pattern"
    fields.require(key)
    written = fields.listed(key, str, ()) if named else tuple(fields.text(key, ""))
    known = {kind: kind for kind in PATTERN.values()} | NAMES if named else PATTERN
    for word in written:
        if word not in known:
            raise fields.error(key, f"names an unknown layer '{word}'", f"known: {', '.join(known)}")
    layers = fields.integer("num_hidden_layers", len(written))
    if layers != len(written):
        raise fields.error(key, f"has {len(written)} items for {layers} layers", "one for each layer")
    if not 1 <= layers <= MAX_LAYERS:
        raise fields.error(key, f"has {layers} items", f"it must have 1 to {MAX_LAYERS}")
    return [known[str(word)] for word in written]


def _activation(fields: Fields) -> Activation:
    act = fields.text("activation", "relu2")
    if act not in WITHOUT_GATE:
        raise fields.error("activation", f"'{act}' is not supported", f"{', '.join(WITHOUT_GATE)} are")
    return Activation(kind=cast(ActivationKind, act))


def _shared_experts(fields: Fields) -> SharedExperts:
    """One MLP; where it is n times as wide as an expert it is n experts, which can share the kernels of the others."""
    width, expert = fields.integer("shared_experts.intermediate_size"), fields.integer("intermediate_size")
    count = width // expert if width % expert == 0 else 1
    return SharedExperts(count=count, intermediate_size=width // count)


def _mamba(fields: Fields, layers: list[int]) -> Mamba | None:
    """Mamba-2: inputs of the scan, B and C pass the convolution; the gate and a step of each head do not."""
    if not layers:
        return None
    heads, hidden = fields.integer("mamba_num_heads", 128), fields.integer("hidden_size")
    inner, state = heads * fields.integer("mamba_head_dim", 64), fields.integer("ssm_state_size", 128)
    convolved = inner + 2 * fields.integer("mamba.groups", 8) * state
    window = fields.integer("mamba.window", 4)
    dtype = fields.text("mamba.state_dtype", "float32")
    if dtype not in get_args(DType):
        hint = f"one of {', '.join(get_args(DType))}"
        raise fields.error("mamba.state_dtype", f"'{dtype}' is not supported", hint)
    return Mamba(
        layers=tuple(layers),
        parameters=hidden * (inner + convolved + heads) + convolved * window + inner * hidden,
        state_elements=inner * state,
        window_elements=convolved * window,
        state_dtype=cast(DType, dtype),
    )
