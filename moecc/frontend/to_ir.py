"""CompileSpec -> IR: one function a layer, every op located where its values were written."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from moecc.errors import Location
from moecc.frontend.spec import Attention, CompileSpec, Execution, Mamba, ModelSpec, locate
from moecc.ir import ops
from moecc.ir.core import Builder, Function, Module, Value
from moecc.ir.types import DTYPE_BYTES, TOKENS, TokensType, Type, WeightsType

UNKNOWN_DENSE = "dense layers of unknown width are not counted"
# Of the selective scan for each element of the state and token: github.com/state-spaces/mamba/issues/110.
SCAN_FLOPS = 9.0


def import_model(spec: CompileSpec) -> Module:
    """The model as IR, before any pass: functions `layer0`, `layer1`, … and what is shared as attributes."""
    model = spec.model
    functions = [_layer(spec, layer) for layer in range(model.layers)]
    return Module(re.sub(r"[^\w.\-]", "-", model.name), functions, _attributes(spec))


def _attributes(spec: CompileSpec) -> dict[str, Any]:
    model, serving = spec.model, spec.serving
    return {
        "family": model.family,
        "dtype": model.dtype,
        "embedding_bytes": _embedding_bytes(model),
        "cluster": asdict(spec.cluster),
        "serving": {
            "execution": serving.execution,
            "context": serving.context_length,
            "decode": serving.tokens_per_device.decode,
            "prefill": serving.tokens_per_device.prefill,
        },
        "placement_request": asdict(spec.placement),
        "notes": [*spec.notes, *model.notes, *_notes(model, serving.execution)],
    }


def _notes(model: ModelSpec, execution: Execution) -> list[str]:
    notes = []
    if model.attention is None:
        notes.append("attention is not given: its time, weights and KV cache are not counted")
    if model.vocab_size is None:
        notes.append("vocab_size is not given: embeddings are not counted")
    if model.dense_layers and model.dense_intermediate_size is None:
        notes.append(UNKNOWN_DENSE)
    if model.mamba is not None:
        notes.append(
            f"{len(model.mamba.layers)} Mamba layers are predicted from their weights, their state and {SCAN_FLOPS:g} "
            "operations for each element of it; no measurement of such a layer stands behind their time"
        )
        if execution == "migrate":
            notes.append(
                "a token that migrates takes the state of its Mamba layers along: that is not counted"
            )
    return notes


def _embedding_bytes(model: ModelSpec) -> int:
    tables = 1 if model.tie_embeddings else 2
    return tables * (model.vocab_size or 0) * model.hidden_size * DTYPE_BYTES[model.dtype]


def _layer(spec: CompileSpec, layer: int) -> Function:
    model = spec.model
    x = Value("x", TokensType(TOKENS, model.hidden_size, model.dtype))
    function = Function(f"layer{layer}", [x], attributes={"layers": [layer]})
    function.location = _located(model, "layers")
    build = Builder(function, _located(model, "attention"))
    build(ops.Attention, _attention_costs(spec, layer), x=x)
    attention = function.ops[0]
    stream, normed = attention.all_results
    ffn = _feed_forward(model, function, normed, layer)
    build.location = _located(model, "hidden_size")
    function.returns = [build(ops.Residual, parts=[stream, *ffn])]
    return function


def _located(model: ModelSpec, key: str) -> Location:
    place = locate(model.locations, key, model.source)
    return place if isinstance(place, Location) else Location(str(place), 1, 1)


def _argument(function: Function, name: str, shape: tuple[int, ...], dtype: str) -> Value:
    type: Type = WeightsType(shape, dtype)
    function.arguments.append(Value(name, type))
    return function.arguments[-1]


def _feed_forward(model: ModelSpec, function: Function, x: Value, layer: int) -> list[Value]:
    if layer in model.moe_layers:
        return _experts(model, function, x)
    return _dense(model, function, x) if layer in model.dense_layers else []


def _activation(model: ModelSpec) -> dict[str, Any]:
    activation = model.activation
    return {"activation": activation.kind, "alpha": activation.alpha, "limit": activation.limit}


def _dense(model: ModelSpec, function: Function, x: Value) -> list[Value]:
    width, hidden = model.dense_intermediate_size, model.hidden_size
    if width is None:
        return []
    build = Builder(function, _located(model, "dense_intermediate_size"))
    columns = model.activation.gate_up_columns(width)
    gate_up = _argument(function, "gate_up", (columns, hidden), model.dtype)
    down = _argument(function, "down", (hidden, width), model.dtype)
    return [build(ops.DenseMlp, _activation(model), x=x, gate_up=gate_up, down=down)]


def _experts(model: ModelSpec, function: Function, x: Value) -> list[Value]:
    experts, hidden, width = model.experts, model.hidden_size, model.intermediate_size
    gate = _argument(function, "gate", (experts, hidden), model.dtype)
    bias = _argument(function, "router_bias", (experts,), model.dtype) if model.router_bias else None
    correction = (
        _argument(function, "correction_bias", (experts,), "float32") if model.router.selection_bias else None
    )
    columns = model.activation.gate_up_columns(width)
    gate_up = _argument(function, "gate_up", (experts, columns, hidden), model.dtype)
    down = _argument(function, "down", (experts, hidden, width), model.dtype)
    biases: dict[str, Value] = {}
    if model.expert_bias:
        biases["gate_up_bias"] = _argument(function, "gate_up_bias", (experts, columns), model.dtype)
        biases["down_bias"] = _argument(function, "down_bias", (experts, hidden), model.dtype)
    build = Builder(function, _located(model, "router"))
    logits = build(ops.Gate, x=x, weight=gate, bias=bias)
    build.location = _located(model, "top_k")
    router = asdict(model.router) | {"top_k": model.top_k}
    routing = build(ops.Route, router, logits=logits, correction_bias=correction)
    build.location = _located(model, "intermediate_size")
    rows = build(ops.Dispatch, x=x, routing=routing)
    operands = {"rows": rows, "routing": routing, "gate_up": gate_up, "down": down, **biases}
    y = build(ops.Experts, _activation(model), **operands)
    return [build(ops.Combine, rows=y, routing=routing), *_shared(model, function, x)]


def _shared(model: ModelSpec, function: Function, x: Value) -> list[Value]:
    shared, hidden = model.shared_experts, model.hidden_size
    if shared.count == 0:
        return []
    build = Builder(function, _located(model, "shared_experts"))
    width = shared.intermediate_size
    columns = model.activation.gate_up_columns(width)
    gate_up = _argument(function, "shared_gate_up", (shared.count, columns, hidden), model.dtype)
    down = _argument(function, "shared_down", (shared.count, hidden, width), model.dtype)
    gate = _argument(function, "shared_gate", (1, hidden), model.dtype) if shared.gated else None
    return [build(ops.SharedExpert, _activation(model), x=x, gate_up=gate_up, down=down, gate=gate)]


def _attention_costs(spec: CompileSpec, layer: int) -> dict[str, Any]:
    """Of one token in one layer: projections, scores and KV entries, or, where a state-space mixer is, its state.

    All zero where nothing but a norm is, or where attention is not given.
    """
    attention, mamba, size = spec.model.attention, spec.model.mamba, DTYPE_BYTES[spec.model.dtype]
    context = spec.serving.context_length
    if mamba is not None and layer in mamba.layers:
        return _mamba_costs(mamba, size)
    if attention is None or (attention.layers is not None and layer not in attention.layers):
        return {**_NO_MIXER, "context": context}
    if attention.sliding_window is not None and layer in attention.window_layers:
        context = min(context, attention.sliding_window)
    parameters = _attention_parameters(attention, spec.model.hidden_size)
    return {
        "flops_per_token": 2.0 * parameters,
        "flops_per_context_token": 2.0 * attention.heads * _score_width(attention),
        "weight_bytes": parameters * size,
        "kv_bytes_per_token": attention.kv_elements * size,
        "context": context,
    }


_NO_MIXER = {
    "flops_per_token": 0.0,
    "flops_per_context_token": 0.0,
    "weight_bytes": 0,
    "kv_bytes_per_token": 0,
}


def _mamba_costs(mamba: Mamba, size: int) -> dict[str, Any]:
    state = mamba.state_elements * DTYPE_BYTES[mamba.state_dtype] + mamba.window_elements * size
    return {
        **_NO_MIXER,
        "flops_per_token": 2.0 * mamba.parameters + SCAN_FLOPS * mamba.state_elements,
        "weight_bytes": mamba.parameters * size,
        "state_bytes": state,
        "context": 0,
    }


def _attention_parameters(attention: Attention, hidden: int) -> int:
    heads = attention.heads
    if attention.kind == "gqa":
        return hidden * attention.head_dim * (2 * heads + 2 * attention.kv_heads)
    latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    nope, value = attention.qk_nope_head_dim, attention.v_head_dim
    query = heads * (nope + rope)
    lora = attention.q_lora_rank
    queries = hidden * query if lora is None else lora * (hidden + query)
    return queries + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden


def _score_width(attention: Attention) -> int:
    """Multiply-adds of one head for one context token: scores and values (MLA works on the latent, absorbed)."""
    if attention.kind == "mla":
        return 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    return 2 * attention.head_dim
