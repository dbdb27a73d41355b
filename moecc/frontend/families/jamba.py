"""Jamba: softmax over all experts, top-k, not normalised; Mamba in most layers, attention and experts in some."""

from __future__ import annotations

from moecc.frontend.families import base
from moecc.frontend.fields import Fields, JsonObject
from moecc.frontend.spec import Mamba, ModelSpec
from moecc.ir.semantics import Router

KEYS = {
    **base.KEYS,
    "experts": ("num_experts", "num_local_experts"),
    "dense_intermediate_size": ("intermediate_size",),
}
REQUIRED = (*base.REQUIRED, "attention.kv_heads")


def read(document: JsonObject, name: str) -> ModelSpec:
    """ModelSpec of a config.json with model_type jamba (transformers JambaTopKRouter, JambaMambaMixer)."""
    fields = Fields(document, KEYS)
    fields.require(*REQUIRED)
    with_experts = _every(fields, "expert_layer", 2, 1) if fields.integer("experts") > 1 else ()
    with_attention = _every(fields, "attn_layer", 8, 4)
    layers = base.checked_layers(fields)
    return base.build(
        fields,
        name=name,
        family="jamba",
        dense_layers=sorted(set(layers) - set(with_experts)),
        dense_intermediate_size=fields.integer("dense_intermediate_size"),
        router=Router(score="softmax"),
        activation=base.glu_activation(fields),
        attention=base.gqa_attention(fields, layers=with_attention),
        mamba=_mamba(fields, sorted(set(layers) - set(with_attention))),
    )


def _every(fields: Fields, kind: str, period: int, offset: int) -> tuple[int, ...]:
    """The layers whose index is `<kind>_offset` modulo `<kind>_period`."""
    every = fields.integer(f"{kind}_period", period)
    first = fields.integer(f"{kind}_offset", offset, minimum=0)
    if first >= every:
        hint = f"it must be in [0, {every - 1}]"
        raise fields.error(f"{kind}_offset", f"{first} is not smaller than the period {every}", hint)
    return tuple(layer for layer in base.checked_layers(fields) if layer % every == first)


def _mamba(fields: Fields, layers: list[int]) -> Mamba | None:
    """Mamba-1: transformers keeps its state in float32, as the scan returns it."""
    hidden, state = fields.integer("hidden_size"), fields.integer("mamba_d_state", 16)
    inner, window = fields.integer("mamba_expand", 2) * hidden, fields.integer("mamba_d_conv", 4)
    automatic = fields.get("mamba_dt_rank") in (None, "auto")
    rank = -(-hidden // 16) if automatic else fields.integer("mamba_dt_rank")
    projections = hidden * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * hidden
    if not layers:
        return None
    return Mamba(
        layers=tuple(layers),
        parameters=projections + inner * (window + state),
        state_elements=inner * state,
        window_elements=inner * window,
        state_dtype="float32",
    )
