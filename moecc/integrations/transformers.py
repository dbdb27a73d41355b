"""`experts_implementation="moecc"` for transformers 5: the experts of its models on moecc's kernels.

    import moecc.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moecc")

The import registers the name, nothing else. It is for inference: where gradients are asked for, and for experts that
the kernels do not know, `grouped_mm` of transformers computes instead, and a warning says why, once. torch.compile
leaves its graph around the experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moecc.autotune.checking import choose_checked
from moecc.codegen.config import DTYPE_BYTES, DType, LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.targets import TARGETS
from moecc.errors import MoeccError
from moecc.ir.semantics import Activation

NAME = "moecc"
# Attributes under which experts with a clamped SwiGLU keep (alpha, limit).
CLAMP_ATTRIBUTES = (("alpha", "limit"), ("swiglu_alpha", "swiglu_limit"))
PAIRS_PER_CHANNEL = 16


class UnknownExpertsError(Exception):
    """What the kernels do not know about some experts: the reason of a fallback."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The weights of one module as the kernels read them, and what they were made from.

    sources: the module's tensors, with addresses and versions at that time. Holding them keeps their addresses from
    being given to others.
    """

    sources: tuple[torch.Tensor, ...]
    stamps: tuple[tuple[int, int], ...]
    weights: Mapping[str, torch.Tensor]
    activation: Activation


_EXPERTS: WeakKeyDictionary[torch.nn.Module, Experts] = WeakKeyDictionary()


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of one layer: [tokens, hidden] for hidden_states of that shape.

    top_k_index, top_k_weights [tokens, top_k]: the ids of a token are distinct, but for those that are no expert's
    (expert parallelism marks what others compute with num_experts), which add nothing.
    Raises RuntimeError for a device without kernels.
    """
    tensors = _tensors(module)
    try:
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (hidden_states, top_k_weights, *tensors.values())
        ):
            raise UnknownExpertsError("gradients are asked for, and the kernels run forward only")
        experts = _experts(module, tensors)
    except UnknownExpertsError as reason:
        _say_once(f"{type(module).__name__}: {reason}; grouped_mm computes instead")
        out: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return out
    gate_up = experts.weights["gate_up"]
    launcher = _launcher(
        (gate_up.shape[2], gate_up.shape[1] // 2, gate_up.shape[0], top_k_index.shape[1]),
        1 << max(len(hidden_states) - 1, 0).bit_length(),
        _dtype_name(gate_up.dtype),
        experts.activation,
        "gate_up_bias" in experts.weights,
    )
    x = hidden_states.to(gate_up.dtype)
    return launcher.experts(x, top_k_index, top_k_weights, experts.weights).to(hidden_states.dtype)


@cache
def _launcher(
    sizes: tuple[int, int, int, int], tokens: int, dtype: DType, activation: Activation, has_bias: bool
) -> Launcher:
    """A launcher with the configs that were tuned for `tokens`, or the default ones.

    sizes: hidden, intermediate, experts, top_k.
    Configs are made for every target that has some: the launcher knows which one it runs on.
    """
    hidden, intermediate, experts, top_k = sizes
    shape = LayerShape(
        tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        experts=max(experts, top_k),
        slots=experts,
        top_k=top_k,
        dtype=dtype,
        activation=activation,
        has_expert_bias=has_bias,
    )
    configs = {}
    for target in TARGETS:
        try:
            configs[target] = freeze_configs(choose_checked(shape, target).configs)
        except MoeccError:  # nothing fits this target, and the launcher says so where it is the one that runs
            continue
    return Launcher(freeze_layer(shape), configs)


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"moecc: {reason}", stacklevel=3)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights by the kernels' names, in the module's layout."""
    if not module.has_gate:
        return {}
    names = ["gate_up", "down", *(("gate_up_bias", "down_bias") if module.has_bias else ())]
    return {name: getattr(module, _source_name(name)) for name in names}


def _source_name(name: str) -> str:
    return name.replace("_bias", "_proj_bias") if name.endswith("_bias") else f"{name}_proj"


def _experts(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Experts:
    """The module's experts, made anew when a tensor is another one or was written to.

    Writes through `.data` leave no trace: a copy that was made of such a tensor stays as it was.
    """
    stamps = tuple(_stamp(tensor) for tensor in tensors.values())
    found = _EXPERTS.get(module)
    if found is None or found.stamps != stamps:
        _require_known(module, tensors)
        found = _EXPERTS[module] = Experts(
            sources=tuple(tensor.detach() for tensor in tensors.values()),
            stamps=stamps,
            weights={name: _natural(module, name, tensor.detach()) for name, tensor in tensors.items()},
            activation=_activation(module, tensors["gate_up"]),
        )
    return found


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, version); a tensor of inference mode has no version, and only one that is not copied may lack it."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _require_known(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises UnknownExpertsError for experts that the kernels cannot compute, whatever their gate."""
    if not tensors:
        raise UnknownExpertsError("they have no gate")
    if module.has_post_expert_norm:
        raise UnknownExpertsError("a norm follows every expert")
    for name in ("gate_up", "down"):
        if _dtype_name(tensors[name].dtype) not in DTYPE_BYTES:
            raise UnknownExpertsError(f"{_source_name(name)} is {tensors[name].dtype}")
    if tensors["down"].dtype != tensors["gate_up"].dtype:
        raise UnknownExpertsError("gate_up_proj and down_proj differ in dtype")


def _dtype_name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _natural(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the kernels' layout: itself where that is the module's, else a copy.

    The kernels take [experts, outputs, inputs] and gate rows before up rows; `is_transposed` modules have [experts,
    inputs, outputs], those that are not `is_concatenated` gate and up columns in turn.
    """
    natural = tensor.transpose(1, 2) if module.is_transposed and tensor.ndim == 3 else tensor
    if name.startswith("gate_up") and not module.is_concatenated:
        natural = torch.cat((natural[:, ::2], natural[:, 1::2]), dim=1)
    natural = natural.contiguous()
    if natural.data_ptr() != tensor.data_ptr() and tensor.is_inference():
        raise UnknownExpertsError(
            f"{_source_name(name)} has to be copied, and was made in inference mode, where writes to it go unseen"
        )
    return natural


def _activation(module: Any, gate_up: torch.Tensor) -> Activation:
    """The activation of the kernels that agrees with the module's own gate on a table of pairs (gate, up).

    Every channel meets some of the pairs, so that a gate which is not the same in all channels agrees with none.
    Raises UnknownExpertsError where none agrees.
    """
    positive = torch.cat((torch.linspace(0, 8, 33), torch.logspace(1, 15, 15)))
    values = torch.cat((positive, -positive))
    shuffled = torch.randperm(len(values) ** 2, generator=torch.Generator().manual_seed(0))
    pairs = torch.cartesian_prod(values, values)[shuffled]
    channels = gate_up.shape[2 if module.is_transposed else 1] // 2
    rows = max(PAIRS_PER_CHANNEL, -(-len(pairs) // channels))
    table = pairs[torch.arange(rows * channels) % len(pairs)].to(gate_up.device).view(rows, channels, 2)
    gate, up = table.unbind(dim=2)
    with torch.no_grad():
        found = module._apply_gate(torch.cat((gate, up), 1) if module.is_concatenated else table.flatten(1))
    for activation in _candidates(module):
        if torch.allclose(found, _activate(gate, up, activation), rtol=1e-5, atol=1e-5):
            return activation
    raise UnknownExpertsError("their gate is neither SiLU, exact GELU nor the clamped SwiGLU of gpt-oss")


def _candidates(module: torch.nn.Module) -> list[Activation]:
    clamps = [[getattr(module, name, None) for name in pair] for pair in CLAMP_ATTRIBUTES]
    return [
        Activation(kind="silu_glu"),
        Activation(kind="gelu_glu"),
        *(
            Activation(kind="clamped_swiglu", alpha=float(alpha), limit=float(limit))
            for alpha, limit in clamps
            if isinstance(alpha, (int, float)) and isinstance(limit, (int, float))
        ),
    ]


def _activate(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The formula of `Activation`."""
    if activation.kind == "silu_glu":
        return functional.silu(gate) * up
    if activation.kind == "gelu_glu":
        return functional.gelu(gate) * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)


_disable: Any = torch.compiler.disable  # untyped
ALL_EXPERTS_FUNCTIONS.register(NAME, _disable(experts_forward))
