"""Which activation stands between two expert GEMMs: the one that computes the same, however it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, get_args

import torch
from torch import Tensor, fx

from moecc.integrations.dynamo.evaluate import Sizes, evaluate
from moecc.integrations.dynamo.graph import UnmatchedError, region, value
from moecc.ir.semantics import Activation, ActivationKind
from moecc.runtime.reference import activate

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
    constants = sorted({c for node in region([outer], [inner]) for c in _constants(node)} - {0.0})
    for interleaved in (False, True) if gated else (False,):
        rows = table.flatten(1) if interleaved else table.transpose(1, 2).flatten(1)
        (found,) = evaluate([outer], {inner: rows}, Sizes(len(rows)), what="its activation", keep_dtype=True)
        for activation in _candidates(gated, constants):
            expected = activate(activation, table[..., 0], table[..., -1])
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-6):
                return Gate(activation, interleaved)
    raise UnmatchedError("what stands between its GEMMs agrees with no activation of the kernels")


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


def _candidates(gated: bool, constants: Sequence[float]) -> Iterator[Activation]:
    """Every kind with a gate or without, the clamped one with all alphas and limits that occur in the graph."""
    kinds: tuple[ActivationKind, ...] = get_args(ActivationKind)
    for kind in kinds:
        settings = product(constants, constants) if kind == "clamped_swiglu" else [(0.0, 0.0)]
        for alpha, limit in settings:
            if (activation := Activation(kind=kind, alpha=alpha, limit=limit)).gated == gated:
                yield activation
