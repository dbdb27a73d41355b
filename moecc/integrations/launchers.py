"""Launchers for shapes that are met at run time: one for each shape, type and power of two of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import torch

from moecc.autotune.checking import choose_checked
from moecc.autotune.training_defaults import training_configs
from moecc.codegen.config import DTYPE_BYTES, KernelConfigs, LayerShape
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.targets import TARGETS
from moecc.codegen.training import TrainingLauncher
from moecc.errors import InputError, MoeccError
from moecc.ir.semantics import Activation, ActivationKind

WHERE = "moecc::experts"


def token_bucket(tokens: int) -> int:
    """The power of two that configs are made for."""
    return 1 << max(tokens - 1, 0).bit_length()


@cache
def launcher_of(
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
) -> TrainingLauncher:
    """A launcher with the configs that were tuned for `tokens`, or the default ones, for every target that has some: it
    knows which one it runs on.

    gate_up: the shape of that weight. Raises InputError for a type, an activation or a shape that no kernel knows.
    """
    if activation not in get_args(ActivationKind):
        hint = f"known activations: {', '.join(get_args(ActivationKind))}"
        raise InputError(f"unknown activation {activation!r}", where=WHERE, hint=hint)
    if (name := str(dtype).removeprefix("torch.")) not in DTYPE_BYTES:
        raise InputError(f"x is {name}", where=WHERE, hint=f"known types: {', '.join(DTYPE_BYTES)}")
    experts, columns, hidden = (gate_up[0], gate_up[2], gate_up[1]) if transposed else gate_up
    function = Activation(kind=activation, alpha=alpha, limit=limit)
    intermediate = function.intermediate_of(columns)
    if intermediate is None:
        hint = "an activation without a gate takes any number"
        raise InputError(f"gate and up cannot share {columns} outputs", where=WHERE, hint=hint)
    shape = LayerShape(
        tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        experts=max(experts, top_k),
        slots=experts,
        top_k=top_k,
        dtype=name,
        activation=function,
        has_expert_bias=has_bias,
        transposed=transposed,
        interleaved=interleaved,
    )
    return TrainingLauncher(freeze_layer(shape), configs_for(shape, _for_training))


def tuned_configs(shape: LayerShape, target: str) -> KernelConfigs:
    """Those that were tuned and compute the same, or the default ones."""
    return choose_checked(shape, target).configs


def _for_training(shape: LayerShape, target: str) -> KernelConfigs:
    return training_configs(shape, target, tuned_configs(shape, target))


def configs_for(
    shape: LayerShape, make: Callable[[LayerShape, str], KernelConfigs]
) -> dict[str, dict[str, Any]]:
    """What `make` finds for every target for which anything fits, as a launcher takes it."""
    configs = {}
    for target in TARGETS:
        try:
            configs[target] = freeze_configs(make(shape, target))
        except MoeccError:  # nothing fits this target, and the launcher says so where it is the one that runs
            continue
    return configs
