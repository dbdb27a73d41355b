"""The experts implementation `moecc` of transformers: importing this module registers it, for inference.

    import moecc.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moecc")

Experts in a layout that the kernels take run on them; others run as `grouped_mm`, which is said once with the reason.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)

from moecc.autotune.defaults import default_configs
from moecc.codegen.config import LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.ir.semantics import Activation, ActivationKind

ACTIVATIONS: dict[str, ActivationKind] = {
    "SiLU": "silu_glu",
    "SiLUActivation": "silu_glu",
    "GELUActivation": "gelu_glu",
}
"""Class of `act_fn` -> what the kernels call it."""
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [tokens, hidden], ids and weights [tokens, top_k] -> [tokens, hidden].

    An id that is no expert of this module is another device's and adds nothing.
    """
    reason = why_not_fused(self, hidden_states, top_k_weights)
    if reason:
        _say_once(type(self).__name__, reason)
        fallback: torch.Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return fallback
    out: torch.Tensor = _run_kernels(self, hidden_states, top_k_index, top_k_weights)
    return out


def why_not_fused(
    experts: Any, hidden_states: torch.Tensor, top_k_weights: torch.Tensor | None = None
) -> str | None:
    """Why the kernels cannot compute these experts on such a tensor, None if they can."""
    for lacks, reason in (
        (not experts.has_gate, "experts without a gate"),
        (experts.has_bias, "experts with biases"),
        (experts.is_transposed, "transposed weights"),
        (not experts.is_concatenated, "interleaved gate and up weights"),
        (experts.has_post_expert_norm, "a norm behind every expert"),
        (type(experts)._apply_gate is not _default_apply_gate, "a gating of the model's own"),
    ):
        if lacks:
            return reason
    if type(experts.act_fn).__name__ not in ACTIVATIONS or _approximates(experts.act_fn):
        return f"the activation {type(experts.act_fn).__name__}"
    weights = (experts.gate_up_proj, experts.down_proj)
    if hidden_states.dtype not in DTYPES or any(weight.dtype != hidden_states.dtype for weight in weights):
        return f"{hidden_states.dtype} tokens with {weights[0].dtype} weights"
    if not all(weight.is_contiguous() for weight in weights):
        return "weights that are not contiguous"
    inputs = (hidden_states, *weights, *([] if top_k_weights is None else [top_k_weights]))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return "gradients: the kernels compute the forward pass alone, under torch.no_grad()"
    return None


def _approximates(activation: Any) -> bool:
    """GELU by another formula than erf."""
    return getattr(activation, "use_gelu_python", False) or "tanh" in str(
        getattr(activation, "approximate", "")
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_kernels(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    count, width, hidden = experts.gate_up_proj.shape
    launcher = _launcher(
        hidden,
        width // 2,
        count,
        min(top_k_index.shape[-1], count),
        DTYPES[hidden_states.dtype],
        ACTIVATIONS[type(experts.act_fn).__name__],
        _bucket(len(hidden_states)),
        _target(hidden_states.device),
    )
    weights = {"gate_up": experts.gate_up_proj, "down": experts.down_proj}
    return launcher.experts(hidden_states, top_k_index, top_k_weights, weights)


def _bucket(tokens: int) -> int:
    """Configs are chosen for the power of two from there on."""
    return 1 << max(tokens - 1, 0).bit_length()


@cache
def _launcher(
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    dtype: Any,
    activation: ActivationKind,
    tokens: int,
    target: str,
) -> Launcher:
    shape = LayerShape(
        tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        dtype=dtype,
        activation=Activation(kind=activation),
    )
    return Launcher(freeze_layer(shape), {target: freeze_configs(default_configs(shape, target))})


@cache
def _target(device: torch.device) -> str:
    if device.type == "cpu":
        return "x86"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def _say_once(experts: str, reason: str) -> None:
    warnings.warn(f"moecc: {experts} run as grouped_mm: no kernel for {reason}", stacklevel=4)


ALL_EXPERTS_FUNCTIONS.register("moecc", experts_forward)
