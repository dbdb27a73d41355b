"""What the config.json files of all families share: names of fields, attention, dtype and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import cast, get_args

from moecc.frontend.checks import MAX_LAYERS
from moecc.frontend.fields import Fields
from moecc.frontend.spec import Attention, DType, Mamba, ModelSpec, SharedExperts
from moecc.ir.semantics import Activation, Router

KEYS: Mapping[str, Sequence[str]] = {
    "layers": ("num_hidden_layers",),
    "top_k": ("num_experts_per_tok",),
    "tie_embeddings": ("tie_word_embeddings",),
    "dtype": ("dtype", "torch_dtype"),
    "activation": ("hidden_act",),
    "attention.heads": ("num_attention_heads",),
    "attention.kv_heads": ("num_key_value_heads",),
    "attention.head_dim": ("head_dim",),
}
REQUIRED = ("hidden_size", "layers", "experts", "top_k", "intermediate_size", "vocab_size", "attention.heads")


def build(
    fields: Fields,
    *,
    name: str,
    family: str,
    layers: int | None = None,
    moe_layers: Sequence[int] | None = None,
    dense_layers: Sequence[int] = (),
    dense_intermediate_size: int | None = None,
    router: Router,
    activation: Activation,
    attention: Attention,
    mamba: Mamba | None = None,
    router_bias: bool = False,
    expert_bias: bool = False,
    shared_experts: SharedExperts | None = None,
    ties_embeddings: bool = False,
    notes: Sequence[str] = (),
) -> ModelSpec:
    """A ModelSpec from what a family decided and the fields that all families share.

    layers: defaults to the config's. moe_layers: default to all that are not dense. ties_embeddings: what a config
    that does not say means.
    """
    layers = fields.integer("layers", layers)
    dense = tuple(sorted(dense_layers))
    moe = sorted(set(range(layers)) - set(dense)) if moe_layers is None else moe_layers
    dtype, dtype_notes = _dtype(fields)
    return ModelSpec(
        name=name,
        family=family,
        hidden_size=fields.integer("hidden_size"),
        layers=layers,
        moe_layers=tuple(moe),
        dense_layers=dense,
        experts=fields.integer("experts"),
        top_k=fields.integer("top_k"),
        intermediate_size=fields.integer("intermediate_size"),
        activation=activation,
        router=router,
        router_bias=router_bias,
        expert_bias=expert_bias,
        shared_experts=shared_experts or SharedExperts(),
        attention=attention,
        mamba=mamba,
        dense_intermediate_size=dense_intermediate_size if dense else None,
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=fields.boolean("tie_embeddings", ties_embeddings),
        dtype=dtype,
        notes=(*dtype_notes, *notes),
        source=fields.document.file,
        locations=fields.locations,
    )


def checked_layers(fields: Fields) -> range:
    """range(layers), refused before anything is built from an absurd number."""
    layers = fields.integer("layers")
    if layers > MAX_LAYERS:
        raise fields.error("layers", f"{layers} is out of range", f"it must be in [1, {MAX_LAYERS}]")
    return range(layers)


def glu_activation(fields: Fields) -> Activation:
    """silu_glu or gelu_glu from `hidden_act`."""
    act = fields.text("activation", "silu")
    if act in ("silu", "swish"):
        return Activation(kind="silu_glu")
    if act == "gelu":
        return Activation(kind="gelu_glu")
    raise fields.error("activation", f"'{act}' is not supported", "silu and gelu are")


def require_text(fields: Fields, key: str, known: str) -> None:
    """Errors: InputError where `key` is given and says anything but the one thing that the family computes."""
    if fields.text(key, known) != known:
        hint = f"{fields.text('model_type', '')} computes '{known}'"
        raise fields.error(key, f"'{fields.text(key, known)}' is not supported", hint)


def refuse_shared_bias(fields: Fields, key: str) -> None:
    """Errors: InputError where `key` gives shared experts biases, for which the IR has no place."""
    if fields.boolean(key, False):
        raise fields.error(
            key, "adds biases to shared experts, which are not supported", "false is supported"
        )


def prediction_notes(fields: Fields, key: str) -> list[str]:
    """What to say about multi-token prediction layers, which no step of the model itself runs."""
    layers = fields.integer(key, 0, minimum=0)
    return [f"{layers} multi-token prediction layer(s) are left out"] if layers else []


def gqa_attention(
    fields: Fields,
    *,
    sliding_window: int | None = None,
    window_layers: Sequence[int] = (),
    layers: Sequence[int] | None = None,
) -> Attention:
    """Grouped-query attention; absent `num_key_value_heads` and `head_dim` mean what transformers takes them for."""
    heads = fields.integer("attention.heads")
    return Attention(
        kind="gqa",
        heads=heads,
        kv_heads=fields.integer("attention.kv_heads", heads),
        head_dim=fields.integer("attention.head_dim", fields.integer("hidden_size") // heads),
        sliding_window=sliding_window,
        window_layers=tuple(window_layers) if sliding_window is not None else (),
        layers=None if layers is None else tuple(layers),
    )


def _dtype(fields: Fields) -> tuple[DType, list[str]]:
    notes = []
    if fields.get("dtype") is None:
        notes.append("the config names no dtype: bfloat16 is assumed")
    name = fields.text("dtype", "bfloat16").removeprefix("torch.")
    if name not in get_args(DType):
        raise fields.error("dtype", f"'{name}' is not supported", f"one of {', '.join(get_args(DType))}")
    quantization = fields.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "an unnamed method"))
        notes.append(f"the checkpoint is quantised ({method}); moecc computes in {name}")
    return cast(DType, name), notes


def default_name(fields: Fields, fallback: str) -> str:
    """The last part of `_name_or_path`, the Hugging Face way of naming a config, or `fallback`."""
    return PurePath(fields.text("_name_or_path", "")).name or fallback
