"""A layer to tune on a device that is not there: times follow a formula, and nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache_samples import ENVIRONMENT

from moecc.autotune.cache import Cache
from moecc.autotune.cache_settings import CacheSettings
from moecc.autotune.choose import open_cache
from moecc.autotune.defaults import default_configs
from moecc.autotune.layer_configs import UNIFORM, LayerSpace
from moecc.autotune.race import CandidateError
from moecc.autotune.tune import Budget, Tuning
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.targets import find_target

SHAPE = LayerShape(tokens=16, hidden=512, intermediate=256, experts=16, top_k=4)


def true_us(configs: KernelConfigs) -> float:
    """Least at row tiles of 8, and at columns of 32 in gate_up and of 64 in down."""
    gate_up, down = configs.gate_up, configs.down
    away = abs(gate_up.block_m - 8) + abs(gate_up.block_n - 32) / 4 + abs(down.block_n - 64) / 8
    return 100.0 + away + gate_up.block_k / 1024


@dataclass
class FakeDevice:
    """Counts what is measured. `wrong` and `crashing` are asked of every config."""

    wrong: Any = lambda configs: ""
    crashing: Any = lambda configs: False
    factor: Any = lambda number: 1.0
    timed: list[KernelConfigs] = field(default_factory=list)
    prepared: list[KernelConfigs] = field(default_factory=list)

    def prepare(self, candidates: Sequence[KernelConfigs], timeout_s: float) -> list[str]:
        self.prepared += candidates
        return [self.wrong(configs) for configs in candidates]

    def time_us(self, configs: KernelConfigs, number: int) -> float:
        self.timed.append(configs)
        if self.crashing(configs):
            raise CandidateError("its process ended with -11")
        return true_us(configs) * float(self.factor(number))


def tuning_cache(folder: Path | None, remote: str = "") -> tuple[Cache, LayerSpace]:
    return open_cache("x86", ENVIRONMENT, CacheSettings(folder=folder, remote=remote))


def tuning(
    opened: tuple[Cache, LayerSpace],
    device: FakeDevice,
    *,
    tokens: int = 16,
    budget: Budget | None = None,
    **others: Any,
) -> Tuning:
    cache, space = opened
    shape = replace(SHAPE, tokens=tokens)
    return Tuning(
        cache=cache,
        key=space.key(shape, UNIFORM),
        shape=shape,
        target=find_target("x86"),
        default=default_configs(shape, "x86"),
        device=device,
        budget=budget or Budget(),
        tools={"triton": "3.7.1"},
        **others,
    )
