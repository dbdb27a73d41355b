"""Tuning of several layers on this machine's device, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moecc.autotune.cache_settings import CacheSettings
from moecc.autotune.choose import environment_for, open_cache
from moecc.autotune.defaults import default_configs
from moecc.autotune.device import WorkerDevice
from moecc.autotune.layer_configs import bucketed
from moecc.autotune.record import Record
from moecc.autotune.routing_class import local_shares, routing_class
from moecc.autotune.tune import Budget, Progress, Tuning
from moecc.codegen.config import LayerShape
from moecc.codegen.targets import find_target
from moecc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What became of one layer: its record, None where time ran out before it, and the configs measured just now."""

    shape: LayerShape
    routing: str
    record: Record | None
    measured: int
    compiled: int


Report = Callable[[LayerShape, Progress], None]


def tune_shapes(
    shapes: Sequence[LayerShape],
    target: str,
    *,
    settings: CacheSettings,
    budget: Budget,
    tools: Mapping[str, str],
    shares: tuple[float, ...] = (),
    shares_from: str = "",
    report: Report = lambda shape, progress: None,
) -> list[Tuned]:
    """Every distinct bucket of the shapes, in their order, on this machine's device of that target.

    shares: of the experts in the routing, all of them; `shares_from` names them in errors.
    InputError for a target that is not here or shares of another model, MoeccError where the default does not run.
    """
    environment = environment_for(target)
    if isinstance(environment, str):
        raise InputError(environment, where="moecc tune", hint="tune on a machine that has the device")
    cache, space = open_cache(target, environment, settings)
    routing, done = routing_class(shares), []
    with tempfile.TemporaryDirectory(prefix="moecc-tune-") as kernels:
        for shape in dict.fromkeys(map(bucketed, shapes)):
            device = WorkerDevice(
                shape=shape,
                target=target,
                default=default_configs(shape, target),
                kernels=Path(kernels),
                shares=local_shares(shares, shape, shares_from),
            )
            with device:
                tuning = Tuning(
                    cache=cache,
                    key=space.key(shape, routing),
                    shape=shape,
                    target=find_target(target),
                    default=device.default,
                    device=device,
                    budget=budget,
                    tools=tools,
                    tell=partial(report, shape),
                )
                record = tuning.run()
            done.append(
                Tuned(
                    shape=shape,
                    routing=routing,
                    record=record,
                    measured=tuning.measured,
                    compiled=device.compiled,
                )
            )
    return done
