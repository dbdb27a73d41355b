"""The configs that a layer runs with: what was tuned for it on this device, else the default, and which of the two."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from functools import cache as memoised
from pathlib import Path
from typing import Literal

from moecc.autotune.cache import Cache
from moecc.autotune.cache_settings import CacheSettings, read_settings
from moecc.autotune.defaults import default_configs
from moecc.autotune.environment import gpu_environment, x86_environment
from moecc.autotune.key import Environment
from moecc.autotune.layer_configs import POLICY, UNIFORM, LayerSpace, configs_of
from moecc.autotune.record import Record
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.targets import find_target
from moecc.errors import MoeccError

log = logging.getLogger(__name__)
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Configs and where they come from: `because` says why not from the cache, or which record they are of.

    median_us, baseline_us: what tuning measured for them and for the default.
    """

    configs: KernelConfigs
    source: Literal["tuned", "default"]
    because: str
    median_us: float | None = None
    baseline_us: float | None = None

    def provenance(self) -> dict[str, str | float | None]:
        """As reports show it."""
        return {
            "source": self.source,
            "because": self.because,
            "median_us": self.median_us,
            "baseline_us": self.baseline_us,
        }


def choose(shape: LayerShape, target: str, *, routing: str = UNIFORM) -> Choice:
    """The configs of that shape on that target, looked up once in a process for each shape, bucket and setting.

    routing: the class that tuning was told; where nothing is known of it, that of a uniform routing counts.
    The cache costs at most one timeout of its remote and raises nothing; what is wrong with it is logged once. Raises
    as `default_configs` for a shape that does not fit or an unknown target.
    """
    try:
        settings = read_settings()
    except MoeccError as error:
        return _default(shape, target, _said_once(str(error)))
    return _chosen(shape, target, routing, settings)


@memoised
def _chosen(shape: LayerShape, target: str, routing: str, settings: CacheSettings) -> Choice:
    opened = _opened(target, settings)
    if isinstance(opened, str):
        return _default(shape, target, opened)
    cache, space = opened
    for form, kind in itertools.product(_equal_forms(shape), dict.fromkeys((routing, UNIFORM))):
        record = cache.get(space.key(form, kind))
        if record is not None:
            return _tuned(record)
    return _default(shape, target, "not tuned on this device")


def _equal_forms(shape: LayerShape) -> list[LayerShape]:
    """Experts that get a routing made elsewhere, all of them here, run as those of a layer with its router."""
    if shape.slots == shape.experts and not shape.received:
        return [shape, replace(shape, slots=None)]
    return [shape]


def _tuned(record: Record) -> Choice:
    return Choice(
        configs=configs_of(record.best.config),
        source="tuned",
        because=f"record {record.key.hash}, {record.key.routing} routing, {record.date}",
        median_us=record.best.median_us,
        baseline_us=record.baseline_us,
    )


def _default(shape: LayerShape, target: str, because: str) -> Choice:
    return Choice(configs=default_configs(shape, target), source="default", because=because)


@memoised
def _opened(target: str, settings: CacheSettings) -> tuple[Cache, LayerSpace] | str:
    """The cache of this machine's environment, or why there is none for that target."""
    try:
        environment = environment_for(target)
        if isinstance(environment, str):
            return environment
        return open_cache(target, environment, settings)
    except MoeccError as error:
        return _said_once(str(error))


def open_cache(target: str, environment: Environment, settings: CacheSettings) -> tuple[Cache, LayerSpace]:
    """Raises as `Cache`."""
    space = LayerSpace(find_target(target))
    return Cache(environment, why_invalid=space, settings=settings), space


def environment_for(target: str) -> Environment | str:
    """This machine's, if kernels of that target run here, or why not. MoeccError where the machine does not tell."""
    backend = find_target(target).backend
    if backend == "interpret":
        return "the interpreter is not tuned"
    if backend == "x86":
        from moecc.codegen.x86.features import supported_levels

        return _x86_here() if supported_levels() else "this CPU runs no kernels"
    # torch takes seconds to import, and most machines that compile have no GPU.
    if not any(Path(file).exists() for file in GPU_FILES):
        return f"no device for {target} is here"
    environment = _gpu_here()
    return environment if environment.arch == target else f"the device here is {environment.arch}"


@memoised
def _x86_here() -> Environment:
    return x86_environment(measurement=POLICY)


@memoised
def _gpu_here() -> Environment:
    return gpu_environment(measurement=POLICY)


@memoised
def _said_once(problem: str) -> str:
    log.warning("configs are the default ones: %s", problem)
    return problem
