"""Which activation of the kernels the experts of a transformers module have: found by comparing numbers."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers.activations import ACT2CLS
from transformers.integrations.moe import _default_apply_gate

from moecc.ir.semantics import Activation, ActivationKind
from moecc.runtime.reference import activate

# Attributes under which experts with a clamped SwiGLU keep (alpha, limit).
CLAMP_ATTRIBUTES = (("alpha", "limit"), ("swiglu_alpha", "swiglu_limit"))
# What transformers makes from a name alone: two instances of one class compute the same.
ACT_CLASSES = frozenset(found for found in ACT2CLS.values() if isinstance(found, type))
CHANNELS = 32

Found = tuple[str, float, float]


def activation_of(module: Any) -> Found | None:
    """(kind, alpha, limit) of `Activation` for an experts module of transformers, None for another activation.

    Dynamo traces this and keeps the answer as a constant. It rests on classes and numbers, not on the module, so that
    one graph serves all layers. What a class that is not transformers' own computes is not known.
    """
    experts_class, act_class = type(module), type(getattr(module, "act_fn", None))
    clamps: list[tuple[Any, Any]] = []
    if module.has_gate and experts_class._apply_gate is not _default_apply_gate:
        clamps = [
            (getattr(module, alpha, None), getattr(module, limit, None)) for alpha, limit in CLAMP_ATTRIBUTES
        ]
    found = _constant(experts_class, act_class, module.has_gate, module.is_concatenated, *clamps)
    return found or None


def _constant(*key: Any) -> Found | tuple[()]:
    return _recognise(*key)


_assume_constant: Any = torch.compiler.assume_constant_result  # untyped
_assume_constant(_constant)


@cache
def _recognise(
    experts_class: Any, act_class: Any, has_gate: bool, is_concatenated: bool, *clamps: tuple[Any, Any]
) -> Found | tuple[()]:
    """The activation that agrees with such a module's own on a table of numbers; () where none does."""
    module = SimpleNamespace()
    for names, values in zip(CLAMP_ATTRIBUTES, clamps, strict=False):
        module.__dict__.update((n, v) for n, v in zip(names, values, strict=True) if v is not None)
    with _disable_current_modes(), torch.no_grad():
        if act_class in ACT_CLASSES:
            module.act_fn = act_class()
        gate, up = _table()
        try:
            if not has_gate:
                found = module.act_fn(up)
            elif is_concatenated:
                found = experts_class._apply_gate(module, torch.cat((gate, up), 1))
            else:
                found = experts_class._apply_gate(module, torch.stack((gate, up), 2).flatten(1))
        except (AttributeError, RuntimeError):  # it asks for more than is known of the module
            return ()
        for candidate in _candidates(has_gate, clamps):
            if torch.allclose(found.double(), activate(candidate, gate, up), rtol=1e-5, atol=1e-5):
                return candidate.kind, candidate.alpha, candidate.limit
    return ()


def _table() -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of gate and up, each [rows, CHANNELS] float64: all of 96 values with all, small and up to 1e15."""
    positive = torch.cat((torch.linspace(0, 8, 33), torch.logspace(1, 15, 15))).double()
    values = torch.cat((positive, -positive))
    pairs = torch.cartesian_prod(values, values)
    shuffled = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    gate, up = shuffled.view(-1, CHANNELS, 2).unbind(2)
    return gate, up


def _candidates(has_gate: bool, clamps: tuple[tuple[Any, Any], ...]) -> list[Activation]:
    kinds: tuple[ActivationKind, ...] = get_args(ActivationKind)
    plain = [Activation(kind=kind) for kind in kinds if kind != "clamped_swiglu"]
    clamped = [
        Activation(kind="clamped_swiglu", alpha=float(alpha), limit=float(limit))
        for alpha, limit in clamps
        if isinstance(alpha, (int, float)) and isinstance(limit, (int, float))
    ]
    return [candidate for candidate in (*plain, *clamped) if candidate.gated == has_gate]
