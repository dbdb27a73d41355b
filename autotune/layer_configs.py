"""The configs of a layer as records keep them, and the keys under which they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from moecc.autotune.key import Key, layer_key
from moecc.autotune.record import Config
from moecc.codegen.config import (
    CombineConfig,
    GemmConfig,
    KernelConfigs,
    LayerShape,
    RouterConfig,
    why_invalid,
)
from moecc.codegen.targets import Target

POLICY = "alternated-ratios/1"
"""How times are taken, part of every environment: see `moecc.autotune.race`. Another way needs another name."""

UNIFORM = "uniform"
_KINDS: Mapping[str, type[Any]] = {
    "router": RouterConfig,
    "gate_up": GemmConfig,
    "down": GemmConfig,
    "combine": CombineConfig,
}


def token_bucket(tokens: int) -> int:
    """The power of two that stands for a count of tokens."""
    return 1 << max(tokens - 1, 0).bit_length()


def bucketed(shape: LayerShape) -> LayerShape:
    """The shape that is tuned in place of this one."""
    received = token_bucket(shape.received) if shape.received else shape.received
    return replace(shape, tokens=token_bucket(shape.tokens), received=received)


def tuning_key(shape: LayerShape, routing: str) -> Key:
    """Of op `layer`, router and experts, where the device holds all experts, else `experts`, with tokens from
    everywhere; the shape's tokens are bucketed.
    """
    op = "layer" if shape.slots is None else "experts"
    return layer_key(bucketed(shape), op=op, kernel="moecc", routing=routing)


def as_config(configs: KernelConfigs) -> Config:
    return {name: dict(vars(getattr(configs, name))) for name in _KINDS}


def configs_of(config: Config) -> KernelConfigs:
    """ValueError for an object that does not hold the fields of every kernel as whole numbers."""
    if set(config) != set(_KINDS):
        raise ValueError(f"it does not configure {', '.join(_KINDS)}")
    return KernelConfigs(**{name: _kernel_config(name, config[name]) for name in _KINDS})


def _kernel_config(name: str, values: Any) -> Any:
    kind = _KINDS[name]
    if not isinstance(values, Mapping) or set(values) != {item.name for item in fields(kind)}:
        raise ValueError(f"{name} has other fields than {kind.__name__}")
    if not all(type(value) is int for value in values.values()):
        raise ValueError(f"a field of {name} is not a whole number")
    return kind(**values)


class LayerSpace:
    """The predicate of a cache: whether a config is one of a layer that this process asked for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._shapes: dict[Key, LayerShape] = {}

    def key(self, shape: LayerShape, routing: str) -> Key:
        """The layer's key; from now on its configs are judged."""
        key = tuning_key(shape, routing)
        self._shapes[key] = bucketed(shape)
        return key

    def __call__(self, key: Key, config: Config) -> str | None:
        if key not in self._shapes:
            return "nobody asked for this layer"
        try:
            return why_invalid(configs_of(config), self._shapes[key], self._target)
        except ValueError as error:
            return str(error)
