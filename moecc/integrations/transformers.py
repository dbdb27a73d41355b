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
from moecc.integrations import experts_op, experts_pieces  # noqa: F401 - registers the ops
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
    if reason := _why_left(module, gate_up, down, ids.shape[1]):
        _say_once(f"{type(module).__name__}: {reason}; grouped_mm computes instead")
        left: Tensor = grouped_mm_experts_forward(module, hidden_states, ids, topk_weights)
        return left
    gate_up_bias = down_bias = None
    if module.has_bias:
        gate_up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    x = hidden_states.to(gate_up.dtype)
    activation = activation_of(module)
    out: Tensor
    if activation is None or module.has_post_expert_norm:
        out = _apart(module, x, ids, topk_weights, (gate_up, gate_up_bias), (down, down_bias))
        return out.to(hidden_states.dtype)
    out = torch.ops.moecc.experts.default(
        x,
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


def _apart(
    module: Any,
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Experts whose activation is the module's own, or that a norm follows: that is torch's, the GEMMs are ours.

    gate_up and down: weights and bias.
    """
    pre = torch.ops.moecc.project(x, ids, *gate_up, module.is_transposed)
    if module._is_expert_parallel:  # rows of other devices' experts hold anything, come last, and get zero
        held = ((ids >= 0) & (ids < module.num_experts)).sum()
        is_foreign = torch.arange(len(pre), device=pre.device)[:, None] >= held
        pre = pre.masked_fill(is_foreign, 0)
    h = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    h = h.to(x.dtype)
    if module._is_expert_parallel:
        h = h.masked_fill(is_foreign, 0)
    out: Tensor
    if not module.has_post_expert_norm:
        out = torch.ops.moecc.combine(h, ids, topk_weights, *down, module.is_transposed)
        return out
    # Every assignment as a token of its own has the same rows.
    slots = ids.reshape(-1, 1)
    rows = torch.ops.moecc.combine(
        h, slots, torch.ones_like(slots, dtype=x.dtype), *down, module.is_transposed
    )
    weights = topk_weights.masked_fill(ids >= module.num_experts, 0)
    out = (module.post_expert_norm(rows).view(*ids.shape, -1) * weights[..., None]).sum(dim=1)
    return out


def _why_left(module: Any, gate_up: Tensor, down: Tensor, top_k: int) -> str | None:
    """Why the kernels cannot compute these experts; None if they can."""
    if module.has_post_expert_norm and top_k > module.num_experts:
        return "a norm follows every expert, and here are fewer experts than a token chooses"
    if gate_up.dtype != down.dtype:
        return f"the first weights are {gate_up.dtype} and down_proj is {down.dtype}"
    if gate_up.dtype not in DTYPES:
        return f"their weights are {gate_up.dtype}"
    return None


def _say_once(reason: str) -> bool:
    """Always true: to dynamo, which calls this while it traces, a constant."""
    return _warn(reason)


_assume_constant: Any = torch.compiler.assume_constant_result  # untyped
_assume_constant(_say_once)


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
