"""The routed experts of one MoE layer as ops of torch: `torch.ops.moecc.experts` and what its gradients need.

    moecc::experts(x, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias,
                   activation, alpha, limit, transposed, interleaved, recompute=False) -> out [T, H]

x [T, H]; ids (any integers) and weights (any floats) [T, k]: the ids of a token are distinct, one outside [0, E) is
another device's and adds nothing. gate_up [E, 2I, H], gate rows first, and down [E, H, I], or `transposed` [E, H, 2I]
and [E, I, H]; `interleaved`: gate and up alternate. activation: an `ActivationKind`; one without a gate takes gate_up
[E, I, H]. x, gate_up and down are of one type, fp32, bf16 or fp16, and so is the result; sums are in fp32.

Importing this module registers the ops with fakes, autograd and autocast, nothing else. They are deterministic, and
opaque to torch.compile and torch.export. A forward whose gradients are wanted keeps its inputs and what enters the
activation, [T * k, 2I]; with `recompute` the inputs alone: the backward then repeats the first GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import Tensor

from moecc.autotune.defaults import default_configs
from moecc.codegen.config import DTYPE_BYTES, LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.targets import TARGETS
from moecc.errors import InputError, MoeccError
from moecc.integrations.torch_pieces import TorchLauncher
from moecc.ir.semantics import Activation, ActivationKind

NAMES = ("x", "topk_ids", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias")
"""The tensors in the order of the ops' arguments; gradients are asked for by these names."""

_TENSORS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias"
)
_SWITCHES = "str activation, float alpha, float limit, bool transposed, bool interleaved"
_SCHEMAS = (
    f"experts({_TENSORS}, {_SWITCHES}, bool recompute=False) -> Tensor",
    f"experts_saving({_TENSORS}, {_SWITCHES}, bool recompute=False) -> (Tensor out, Tensor pre)",
    f"experts_backward(Tensor grad_out, {_TENSORS}, Tensor? pre, {_SWITCHES}, str[] wanted) -> Tensor[]",
)
_LIBRARY = torch.library.Library("moecc", "DEF")


def _experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *switches: Any,
) -> Tensor:
    """See the module; `recompute` means nothing where no gradient is wanted."""
    weights = _weights(gate_up, down, gate_up_bias, down_bias)
    launcher = _launcher_for(x, topk_ids, weights, switches[:5])
    return launcher.experts(x, topk_ids, topk_weights, weights)


def _experts_saving(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, pre): what enters the activation, in an order that only the backward knows; with `recompute` nothing."""
    weights = _weights(gate_up, down, gate_up_bias, down_bias)
    launcher = _launcher_for(x, topk_ids, weights, (activation, alpha, limit, transposed, interleaved))
    if recompute:
        return launcher.experts(x, topk_ids, topk_weights, weights), x.new_empty(0)
    return launcher.experts_saving(x, topk_ids, topk_weights, weights)


def _experts_backward(
    grad_out: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradients of the tensors named in `wanted`, in that order, each of its tensor's shape and type."""
    weights = _weights(gate_up, down, gate_up_bias, down_bias)
    launcher = _launcher_for(x, topk_ids, weights, (activation, alpha, limit, transposed, interleaved))
    found = launcher.experts_backward(
        grad_out, x, topk_ids, topk_weights, weights, pre, wanted=frozenset(wanted)
    )
    arguments = {"x": x, "topk_weights": topk_weights, **weights}
    return [found[name].to(arguments[name].dtype) for name in wanted]


def _weights(
    gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> dict[str, Tensor]:
    """By the launcher's names."""
    weights = {"gate_up": gate_up.contiguous(), "down": down.contiguous()}
    if gate_up_bias is not None and down_bias is not None:
        weights |= {"gate_up_bias": gate_up_bias.contiguous(), "down_bias": down_bias.contiguous()}
    return weights


def _launcher_for(
    x: Tensor, topk_ids: Tensor, weights: Mapping[str, Tensor], switches: tuple[Any, ...]
) -> Launcher:
    tokens = 1 << max(len(x) - 1, 0).bit_length()
    return _launcher(
        weights["gate_up"].shape, topk_ids.shape[1], tokens, x.dtype, "gate_up_bias" in weights, *switches
    )


@cache
def _launcher(
    gate_up: tuple[int, int, int],
    top_k: int,
    tokens: int,
    dtype: torch.dtype,
    has_bias: bool,
    activation: ActivationKind,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
) -> Launcher:
    """A launcher with the default configs for `tokens`, for every target that has some: it knows which one it runs on.

    gate_up: the shape of that weight. Raises InputError for a type or an activation that the kernels do not know.
    """
    stand_in: Any = TorchLauncher(activation, alpha, limit, transposed, interleaved)
    if activation not in get_args(ActivationKind):
        hint = f"known activations: {', '.join(get_args(ActivationKind))}"
        raise InputError(f"unknown activation {activation!r}", where="moecc::experts", hint=hint)
    if (name := str(dtype).removeprefix("torch.")) not in DTYPE_BYTES:
        hint = f"known types: {', '.join(DTYPE_BYTES)}"
        raise InputError(f"x is {name}", where="moecc::experts", hint=hint)
    experts, columns, hidden = (gate_up[0], gate_up[2], gate_up[1]) if transposed else gate_up
    function = Activation(kind=activation, alpha=alpha, limit=limit)
    shape = LayerShape(
        tokens=tokens,
        hidden=hidden,
        intermediate=function.intermediate_of(columns) or columns,
        experts=max(experts, top_k),
        slots=experts,
        top_k=top_k,
        dtype=name,
        activation=function,
        has_expert_bias=has_bias,
        transposed=transposed,
        interleaved=interleaved,
    )
    configs = {}
    for target in TARGETS:
        try:
            configs[target] = freeze_configs(default_configs(shape, target))
        except MoeccError:  # nothing fits this target, and the launcher says so where it is the one that runs
            continue
    launcher: Any = Launcher(freeze_layer(shape), configs)
    launcher.experts_saving, launcher.experts_backward = stand_in.experts_saving, stand_in.experts_backward
    return launcher


def _fake_experts(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_experts_saving(x: Tensor, topk_ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate_up, transposed, recompute = rest[1], rest[8], len(rest) > 10 and rest[10]
    if recompute:
        return _fake_experts(x), x.new_empty(0)
    rows, outputs = topk_ids.shape[0] * topk_ids.shape[1], gate_up.shape[2 if transposed else 1]
    return _fake_experts(x), x.new_empty((rows, outputs))


def _fake_experts_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    named = dict(zip(NAMES, arguments, strict=False))
    return [torch.empty_like(named[name], memory_format=torch.contiguous_format) for name in arguments[-1]]


def _autograd(keyset: Any, *arguments: Any) -> Tensor:
    """Where a gradient is wanted the op is `experts_saving`, which has one."""
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in arguments[: len(NAMES)] if tensor is not None
    ):
        out: Tensor = torch.ops.moecc.experts_saving(*arguments)[0]
        return out
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecc.experts.default.redispatch(
            keyset & torch._C._after_autograd_keyset, *arguments
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.switches, recompute = inputs[len(NAMES) : -1], inputs[-1]
    ctx.save_for_backward(*inputs[: len(NAMES)], None if recompute else pre)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    wanted = [name for name, is_needed in zip(NAMES, needed, strict=False) if is_needed]
    gradients = torch.ops.moecc.experts_backward(grad_out, *ctx.saved_tensors, *ctx.switches, wanted)
    found = dict(zip(wanted, gradients, strict=True))
    return (*map(found.get, NAMES), *[None] * (len(needed) - len(NAMES)))


def _no_second_derivatives(ctx: Any, *_: Any) -> None:
    raise MoeccError(
        "second derivatives are not known",
        where="moecc::experts",
        hint='use experts_implementation="grouped_mm"',
    )


def _autocast(device: str, *arguments: Any) -> Tensor:
    """As a matmul is cast: x and the matrices; routing weights and biases enter sums in fp32 and keep their type."""
    dtype = torch.get_autocast_dtype(device)
    cast = [
        value.to(dtype) if name in ("x", "gate_up", "down") else value
        for name, value in zip(NAMES, arguments, strict=False)
    ]
    with torch.autocast(device, enabled=False):
        out: Tensor = torch.ops.moecc.experts(*cast, *arguments[len(NAMES) :])
    return out


def _register() -> None:
    for schema in _SCHEMAS:
        _LIBRARY.define(schema)
    kernels = {"experts": _experts, "experts_saving": _experts_saving, "experts_backward": _experts_backward}
    fakes = {
        "experts": _fake_experts,
        "experts_saving": _fake_experts_saving,
        "experts_backward": _fake_experts_backward,
    }
    for name, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moecc::{name}", fakes[name], lib=_LIBRARY)
    _LIBRARY.impl("experts", _autograd, "Autograd", with_keyset=True)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl("experts", partial(_autocast, device.lower()), f"Autocast{device}")
    torch.library.register_autograd("moecc::experts_saving", _backward, setup_context=_keep, lib=_LIBRARY)
    torch.library.register_autograd("moecc::experts_backward", _no_second_derivatives, lib=_LIBRARY)


_register()
