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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moecc.codegen.training import TrainingLauncher
from moecc.errors import MoeccError
from moecc.integrations.launchers import launcher_of, token_bucket
from moecc.ir.semantics import ActivationKind

NAMES = ("x", "topk_ids", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias")
"""The tensors in the order of the ops' arguments; gradients are asked for by these names."""

_TENSORS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias"
)
_SWITCHES = "str activation, float alpha, float limit, bool transposed, bool interleaved"
_KERNEL_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_library: Any = torch.library.Library  # untyped
LIBRARY = _library("moecc", "DEF")


class _Call(NamedTuple):
    """The arguments that all three ops have."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: ActivationKind
    alpha: float
    limit: float
    transposed: bool
    interleaved: bool

    def weights(self) -> dict[str, Tensor]:
        """By the launcher's names."""
        weights = {"gate_up": self.gate_up.contiguous(), "down": self.down.contiguous()}
        if self.gate_up_bias is not None and self.down_bias is not None:
            weights["gate_up_bias"] = self.gate_up_bias.contiguous()
            weights["down_bias"] = self.down_bias.contiguous()
        return weights

    def launcher(self) -> TrainingLauncher:
        top_k, tokens = self.topk_ids.shape[1], token_bucket(len(self.x))
        has_bias = self.gate_up_bias is not None
        return launcher_of(self.gate_up.shape, top_k, tokens, self.x.dtype, has_bias, *self[len(NAMES) :])


def _experts(*arguments: Any) -> Tensor:
    """See the module; `recompute`, the last argument, means nothing where no gradient is wanted."""
    call = _Call._make(arguments[: len(_Call._fields)])
    return call.launcher().experts(call.x, call.topk_ids, call.topk_weights, call.weights())


def _experts_saving(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, pre): what enters the activation, in an order that only the backward knows; with `recompute` nothing."""
    call, recompute = _Call._make(arguments[: len(_Call._fields)]), arguments[len(_Call._fields) :] == (True,)
    if recompute:
        return _experts(*call), call.x.new_empty(0)
    return call.launcher().experts_saving(call.x, call.topk_ids, call.topk_weights, call.weights())


def _experts_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of the tensors named in `wanted`, in that order, each of its tensor's shape and type."""
    *tensors, pre = arguments[: len(NAMES) + 1]
    *switches, wanted = arguments[len(NAMES) + 1 :]
    call = _Call(*tensors, *switches)
    found = call.launcher().experts_backward(
        grad_out, call.x, call.topk_ids, call.topk_weights, call.weights(), pre, wanted=frozenset(wanted)
    )
    return [found[name] for name in wanted]


def _fake_experts(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_experts_saving(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, recompute = _Call._make(arguments[: len(_Call._fields)]), arguments[len(_Call._fields) :] == (True,)
    if recompute:
        return _fake_experts(call.x), call.x.new_empty(0)
    rows = call.topk_ids.shape[0] * min(call.topk_ids.shape[1], call.gate_up.shape[0])
    return _fake_experts(call.x), call.x.new_empty((rows, call.gate_up.shape[2 if call.transposed else 1]))


def fake_gradients(names: tuple[str, ...], _: Tensor, *arguments: Any) -> list[Tensor]:
    """Of the tensors `names` that follow a gradient; the last argument tells which are wanted."""
    named = dict(zip(names, arguments, strict=False))
    return [torch.empty_like(named[name], memory_format=torch.contiguous_format) for name in arguments[-1]]


def _autograd(keyset: Any, *arguments: Any) -> Tensor:
    """Where a gradient is wanted the op is `experts_saving`, which has one."""
    out: Tensor
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        out, _ = torch.ops.moecc.experts_saving.default(*arguments)
        return out
    below = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        # Where nothing traces, the kernel is next: another way through the dispatcher would take 10 us.
        if below.highestPriorityTypeId() in _KERNEL_KEYS:
            return _experts(*arguments)
        out = torch.ops.moecc.experts.default.redispatch(below, *arguments)
    return out


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


def no_second_derivatives(ctx: Any, *_: Any) -> None:
    """The backward of a backward."""
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


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An op of the library with its implementation for all devices and for tensors without data."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moecc::{name}", fake, lib=LIBRARY)


define(f"experts({_TENSORS}, {_SWITCHES}, bool recompute=False) -> Tensor", _experts, _fake_experts)
define(
    f"experts_saving({_TENSORS}, {_SWITCHES}, bool recompute=False) -> (Tensor out, Tensor pre)",
    _experts_saving,
    _fake_experts_saving,
)
define(
    f"experts_backward(Tensor grad_out, {_TENSORS}, Tensor? pre, {_SWITCHES}, str[] wanted) -> Tensor[]",
    _experts_backward,
    partial(fake_gradients, NAMES),
)
LIBRARY.impl("experts", _autograd, "Autograd", with_keyset=True)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("experts", partial(_autocast, _device.lower()), f"Autocast{_device}")
torch.library.register_autograd("moecc::experts_saving", _backward, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("moecc::experts_backward", no_second_derivatives, lib=LIBRARY)
