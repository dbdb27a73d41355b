"""The two GEMMs of the experts as ops of their own, for what lies between or behind them and no kernel knows.

    moecc::project(x, topk_ids, gate_up, bias, transposed) -> pre [rows, columns]
    moecc::combine(h, topk_ids, topk_weights, down, bias, transposed) -> out [T, H]

x [T, H], ids and weights [T, k] as those of `moecc::experts`; gate_up [E, columns, H] and down [E, H, I], or
`transposed` [E, H, columns] and [E, I, H]. There are T * min(k, E) rows, sorted by expert. Those past the ids in
[0, E) hold anything, in the gradient of h too.
Importing this module registers the ops with fakes and autograd.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moecc.codegen.training import TrainingLauncher
from moecc.integrations.experts_op import LIBRARY, define, fake_gradients, no_second_derivatives
from moecc.integrations.launchers import launcher_of, token_bucket

_OF_PROJECT = ("x", "topk_ids", "gate_up", "gate_up_bias")
_OF_COMBINE = ("h", "topk_ids", "topk_weights", "down", "down_bias")


def _launcher(
    shape: torch.Size, ids: Tensor, dtype: torch.dtype, has_bias: bool, transposed: bool
) -> TrainingLauncher:
    """For a layer whose gate_up has that shape and no gate: an activation that is not applied."""
    tokens, top_k = ids.shape
    return launcher_of(
        shape, top_k, token_bucket(tokens), dtype, has_bias, "relu", 0.0, 0.0, transposed, False
    )


def _named(name: str, matrix: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    weights = {name: matrix.contiguous()}
    return weights if bias is None else weights | {f"{name}_bias": bias.contiguous()}


def _projecting(
    x: Tensor, ids: Tensor, gate_up: Tensor, bias: Tensor | None, transposed: bool
) -> TrainingLauncher:
    return _launcher(gate_up.shape, ids, x.dtype, bias is not None, transposed)


def _combining(
    h: Tensor, ids: Tensor, down: Tensor, bias: Tensor | None, transposed: bool
) -> TrainingLauncher:
    """The first weights of this layer would lie as down does, its last dimensions changed about."""
    experts, first, second = down.shape
    shape = torch.Size((experts, second, first))
    return _launcher(shape, ids, h.dtype, bias is not None, transposed)


def _project(x: Tensor, ids: Tensor, gate_up: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    launcher = _projecting(x, ids, gate_up, bias, transposed)
    return launcher.project(x, ids, _named("gate_up", gate_up, bias))


def _project_backward(
    grad_pre: Tensor,
    x: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    transposed: bool,
    wanted: list[str],
) -> list[Tensor]:
    launcher = _projecting(x, ids, gate_up, bias, transposed)
    weights = _named("gate_up", gate_up, bias)
    found = launcher.project_backward(grad_pre, x, ids, weights, wanted=frozenset(wanted))
    return [found[name] for name in wanted]


def _combine(
    h: Tensor, ids: Tensor, topk_weights: Tensor, down: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    launcher = _combining(h, ids, down, bias, transposed)
    return launcher.combine(h, ids, topk_weights, _named("down", down, bias))


def _combine_backward(
    grad_out: Tensor,
    h: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    down: Tensor,
    bias: Tensor | None,
    transposed: bool,
    wanted: list[str],
) -> list[Tensor]:
    launcher = _combining(h, ids, down, bias, transposed)
    weights = _named("down", down, bias)
    found = launcher.combine_backward(grad_out, h, ids, topk_weights, weights, wanted=frozenset(wanted))
    return [found[name] for name in wanted]


def _fake_project(x: Tensor, ids: Tensor, gate_up: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    rows = ids.shape[0] * min(ids.shape[1], gate_up.shape[0])
    return x.new_empty((rows, gate_up.shape[2 if transposed else 1]))


def _fake_combine(
    h: Tensor, ids: Tensor, topk_weights: Tensor, down: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    return h.new_empty((ids.shape[0], down.shape[2 if transposed else 1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward(op: str, names: tuple[str, ...], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed]
    gradients = getattr(torch.ops.moecc, op)(grad, *ctx.saved_tensors, ctx.transposed, wanted)
    found = dict(zip(wanted, gradients, strict=True))
    return (*map(found.get, names), None)


_PROJECT = "Tensor x, Tensor topk_ids, Tensor gate_up, Tensor? bias, bool transposed"
_COMBINE = "Tensor h, Tensor topk_ids, Tensor topk_weights, Tensor down, Tensor? bias, bool transposed"
define(f"project({_PROJECT}) -> Tensor", _project, _fake_project)
define(f"combine({_COMBINE}) -> Tensor", _combine, _fake_combine)
define(
    f"project_backward(Tensor grad_pre, {_PROJECT}, str[] wanted) -> Tensor[]",
    _project_backward,
    partial(fake_gradients, _OF_PROJECT),
)
define(
    f"combine_backward(Tensor grad_out, {_COMBINE}, str[] wanted) -> Tensor[]",
    _combine_backward,
    partial(fake_gradients, _OF_COMBINE),
)
for _name, _names in (("project", _OF_PROJECT), ("combine", _OF_COMBINE)):
    _gradients = partial(_backward, f"{_name}_backward", _names)
    torch.library.register_autograd(f"moecc::{_name}", _gradients, setup_context=_keep, lib=LIBRARY)
    torch.library.register_autograd(f"moecc::{_name}_backward", no_second_derivatives, lib=LIBRARY)
