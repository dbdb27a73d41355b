"""`experts_implementation="moecc"` for transformers 5: the experts of its models on moecc's kernels.

    import moecc.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moecc")

The import registers the name and `moecc_recompute`, nothing else. Forward and backward are one op of torch each, which
torch.compile (fullgraph) and torch.export keep whole; under the second name the backward repeats the first GEMM of
the experts instead of keeping its result. Weights are read where they lie, so writes to them are always seen. Where
the kernels do not know some experts, `grouped_mm` of transformers computes instead, and a warning says why, once.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moecc.errors import InputError
from moecc.integrations import experts_op  # noqa: F401 - registers the op
from moecc.integrations.recognise import activation_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def experts_forward(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of one layer: [tokens, hidden] for hidden_states of that shape.

    top_k_index, top_k_weights [tokens, top_k]: the ids of a token are distinct, but for those that are no expert's
    (expert parallelism marks what others compute with num_experts), which add nothing.
    Raises RuntimeError for a device without kernels.
    """
    return _forward(module, hidden_states, top_k_index, top_k_weights, recompute=False)


def experts_forward_recompute(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same; training keeps [tokens * top_k, 2 * intermediate] values less, and computes them twice."""
    return _forward(module, hidden_states, top_k_index, top_k_weights, recompute=True)


def _forward(
    module: Any, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor, recompute: bool
) -> Tensor:
    """Dynamo traces this: what it decides by is constant for a module, and the op is one node."""
    gate_up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    activation = activation_of(module)
    if activation is None or (reason := _why_left(module, gate_up, down)):
        reason = reason if activation else "their activation is none of the kernels'"
        _say_once(f"{type(module).__name__}: {reason}; grouped_mm computes instead")
        left: Tensor = grouped_mm_experts_forward(module, hidden_states, ids, topk_weights)
        return left
    gate_up_bias = down_bias = None
    if module.has_bias:
        gate_up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    out: Tensor = torch.ops.moecc.experts(
        hidden_states.to(gate_up.dtype),
        ids,
        topk_weights,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        *activation,
        module.is_transposed,
        not module.is_concatenated,
        recompute,
    )
    return out.to(hidden_states.dtype)


def _why_left(module: Any, gate_up: Tensor, down: Tensor) -> str | None:
    """Why the kernels cannot compute these experts, whatever their activation; None if they can."""
    if module.has_post_expert_norm:
        return "a norm follows every expert"
    if gate_up.dtype != down.dtype:
        return f"the first weights are {gate_up.dtype} and down_proj is {down.dtype}"
    if gate_up.dtype not in DTYPES:
        return f"their weights are {gate_up.dtype}"
    return None


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> bool:
    """Always true; while dynamo traces it says so too."""
    return _warn(reason)


@cache
def _warn(reason: str) -> bool:
    warnings.warn(f"moecc: {reason}", stacklevel=4)
    return True


def _refuse_fp8(module: torch.nn.Module, *_: Tensor) -> Tensor:
    raise InputError(
        "the kernels have no FP8 experts",
        where=type(module).__name__,
        hint='use experts_implementation="grouped_mm", or load with FineGrainedFP8Config(dequantize=True)',
    )


for _name, _function in (("moecc", experts_forward), ("moecc_recompute", experts_forward_recompute)):
    ALL_EXPERTS_FUNCTIONS.register(_name, _function)
    ALL_FP8_EXPERTS_FUNCTIONS.register(_name, _refuse_fp8)
