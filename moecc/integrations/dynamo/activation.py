"""Which activation stands between two expert GEMMs: the one that computes the same, however it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from moecc.integrations.dynamo.evaluate import Sizes, evaluate
from moecc.integrations.dynamo.graph import UnmatchedError, region, value
from moecc.ir.semantics import Activation, ActivationKind

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
GATED = ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu", "clamped_swiglu")
ROWS_PER_CHANNEL = 16


class Gate(NamedTuple):
    """An activation; `interleaved` where gate and up alternate in its input, else the gate's half comes first."""

    activation: Activation
    interleaved: bool


def recognise(inner: fx.Node, outer: fx.Node, channels: int, *, gated: bool) -> Gate:
    """What turns `inner` [rows, channels or 2 * channels] into `outer` [rows, channels].

    It is evaluated in float64 on a table in which every channel meets many values, or pairs of gate and up, so that
    what treats one channel in another way, or mixes them, agrees with nothing. Changes of dtype are left out: where
    an implementation rounds is not what it computes. Raises UnmatchedError where no activation agrees.
    """
    table = _table(channels, parts=2 if gated else 1)
    kinds = GATED if gated else tuple(FUNCTIONS)
    constants = sorted({c for node in region([outer], [inner]) for c in _constants(node)} - {0.0})
    for interleaved in (False, True) if gated else (False,):
        rows = table.flatten(1) if interleaved else table.transpose(1, 2).flatten(1)
        (found,) = evaluate([outer], {inner: rows}, Sizes(len(rows)), what="its activation", keep_dtype=True)
        for activation in _candidates(kinds, constants):
            expected = activate(table, activation)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-6):
                return Gate(activation, interleaved)
    raise UnmatchedError("what stands between its GEMMs agrees with no activation of the kernels")


def activate(table: Tensor, activation: Activation) -> Tensor:
    """The formula of `Activation` on [..., 2], gate and up, or on [..., 1] without a gate."""
    kind = str(activation.kind)
    if table.shape[-1] == 1:
        return FUNCTIONS[kind](table[..., 0])
    gate, up = table.unbind(-1)
    if kind == "clamped_swiglu":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    return FUNCTIONS[kind.removesuffix("_glu")](gate) * up


def _table(channels: int, parts: int) -> Tensor:
    """[rows, channels, parts]: values from -1e15 to 1e15, dense around zero, in another order in each channel."""
    positive = torch.cat((torch.linspace(0, 9, 37), torch.logspace(1, 15, 15))).double()
    values = torch.cat((positive, -positive))
    entries = torch.cartesian_prod(*[values] * parts).view(-1, parts)
    generator = torch.Generator().manual_seed(0)
    entries = entries[torch.randperm(len(entries), generator=generator)]
    rows = max(ROWS_PER_CHANNEL, -(-len(entries) // channels))
    return entries[torch.arange(rows * channels) % len(entries)].view(rows, channels, parts)


def _constants(node: fx.Node) -> Iterator[float]:
    for argument in (*node.args, *node.kwargs.values()):
        found = value(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(found, (int, float, torch.SymFloat)) and not isinstance(found, bool):
            yield abs(float(found))


def _candidates(kinds: Sequence[str], constants: Sequence[float]) -> Iterator[Activation]:
    """Every kind, the clamped ones with all alphas and limits that occur in the graph."""
    for kind in kinds:
        if kind != "clamped_swiglu":
            yield Activation(kind=cast(ActivationKind, kind))
            continue
        for alpha, limit in product(constants, constants):
            yield Activation(kind=cast(ActivationKind, kind), alpha=alpha, limit=limit)
