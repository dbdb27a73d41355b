"""The fields of a model that are written in model.yaml -> ModelSpec."""

from __future__ import annotations

from typing import get_args

from moecc.errors import InputError
from moecc.frontend.checks import MAX_LAYERS, check_model
from moecc.frontend.schema import AttentionFields, InlineModel, RouterFields
from moecc.frontend.spec import Attention, ModelSpec, SharedExperts
from moecc.frontend.yaml_loader import Document
from moecc.ir.semantics import Activation, ActivationKind, Router


def inline_model(parsed: InlineModel, document: Document) -> ModelSpec:
    """The model, checked. Errors: InputError where two values contradict each other."""
    _no_idle_fields(parsed, document)
    _require_gate(parsed, document)
    layers = parsed.moe_layers + len(parsed.dense_layers)
    dense = _dense_layers(parsed, layers, document)
    shared = parsed.shared_experts
    model = ModelSpec(
        name=parsed.name,
        family="inline",
        hidden_size=parsed.hidden_size,
        layers=layers,
        moe_layers=tuple(layer for layer in range(layers) if layer not in dense),
        dense_layers=tuple(sorted(dense)),
        experts=parsed.experts,
        top_k=parsed.top_k,
        intermediate_size=parsed.intermediate_size,
        activation=Activation(**parsed.activation.model_dump(exclude={"gated"})),
        router=_router(parsed.router),
        router_bias=parsed.router.bias in ("logits", "both"),
        expert_bias=parsed.expert_bias,
        shared_experts=SharedExperts(
            count=shared.count,
            intermediate_size=(shared.intermediate_size or parsed.intermediate_size) if shared.count else 0,
            gated=shared.gated,
        ),
        attention=_attention(parsed.attention, parsed.hidden_size, layers) if parsed.attention else None,
        dense_intermediate_size=parsed.dense_intermediate_size,
        vocab_size=parsed.vocab_size,
        tie_embeddings=parsed.tie_embeddings,
        dtype=parsed.dtype,
        source=document.file,
        locations={
            key.removeprefix("model."): where
            for key, where in document.dotted().items()
            if key.startswith("model.")
        },
    )
    return check_model(model, document.value_at(("model",)))


def _require_gate(parsed: InlineModel, document: Document) -> None:
    """`silu` is easily written for `silu_glu`: experts without a gate, with half the weights, are asked for twice."""
    kind, gated = parsed.activation.kind, Activation(kind=parsed.activation.kind).gated
    if gated == parsed.activation.gated:
        return
    with_gate = f"{kind}_glu" if f"{kind}_glu" in get_args(ActivationKind) else "silu_glu"
    raise InputError(
        f"experts with {kind} have {'a' if gated else 'no'} gate",
        where=document.value_at(("model", "activation")),
        hint="remove gated: false" if gated else f"write {with_gate}, or {{kind: {kind}, gated: false}}",
    )


def _no_idle_fields(parsed: InlineModel, document: Document) -> None:
    """Refuse fields that another field leaves without effect: whoever wrote them expects one."""
    if parsed.router.groups > 1 and parsed.router.top_groups is None:
        raise InputError(
            "groups have no effect without top_groups",
            where=document.value_at(("model", "router", "groups")),
            hint=f"add top_groups in [1, {parsed.router.groups}]",
        )
    idle = sorted(parsed.activation.model_fields_set & {"alpha", "limit"})
    if idle and parsed.activation.kind != "clamped_swiglu":
        raise InputError(
            f"{idle[0]} has no effect on {parsed.activation.kind}",
            where=document.value_at(("model", "activation", idle[0])),
            hint="remove it, or write kind: clamped_swiglu",
        )


def _dense_layers(parsed: InlineModel, layers: int, document: Document) -> frozenset[int]:
    if layers > MAX_LAYERS:
        raise InputError(
            f"moe_layers {parsed.moe_layers} is out of range",
            where=document.value_at(("model", "moe_layers")),
            hint=f"a model may have at most {MAX_LAYERS} layers",
        )
    for index, layer in enumerate(parsed.dense_layers):
        where = document.value_at(("model", "dense_layers", index))
        if layer >= layers:
            raise InputError(
                f"the dense layer {layer} is outside the model",
                where=where,
                hint=f"moe_layers and dense_layers together have indices 0 to {layers - 1}",
            )
        if layer in parsed.dense_layers[:index]:
            raise InputError(
                f"the dense layer {layer} is listed twice", where=where, hint="remove one of them"
            )
    return frozenset(parsed.dense_layers)


def _router(parsed: RouterFields) -> Router:
    return Router(
        score=parsed.score,
        select_first=parsed.select_first,
        selection_bias=parsed.bias in ("selection", "both"),
        groups=parsed.groups,
        top_groups=parsed.top_groups or 1,
        group_score=parsed.group_score,
        normalize=parsed.normalize,
        norm_eps=parsed.norm_eps,
        norm_min=parsed.norm_min,
        scale=parsed.scale,
        jitter=parsed.jitter,
    )


def _attention(parsed: AttentionFields, hidden_size: int, layers: int) -> Attention:
    mla = parsed.kind == "mla"
    rope, nope = parsed.qk_rope_head_dim or 0, parsed.qk_nope_head_dim or 0
    return Attention(
        kind=parsed.kind,
        heads=parsed.heads,
        kv_heads=parsed.kv_heads or parsed.heads,
        head_dim=parsed.head_dim or (nope + rope if mla else hidden_size // parsed.heads),
        kv_lora_rank=parsed.kv_lora_rank or 0,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=parsed.v_head_dim or 0,
        q_lora_rank=parsed.q_lora_rank,
        sliding_window=parsed.sliding_window,
        window_layers=tuple(range(layers)) if parsed.sliding_window else (),
    )
