"""Configs that are good without tuning, by stated rules."""

from __future__ import annotations

from moecc.codegen.config import KernelConfigs, LayerShape


def default_configs(shape: LayerShape, target: str) -> KernelConfigs:
    """Configs for that shape on that target (a compiled target or `interpret`), always valid."""
    raise NotImplementedError
