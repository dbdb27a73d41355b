"""The routing that a layer is tuned for: shares of its experts, and the class that keys are told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moecc.autotune.layer_configs import UNIFORM
from moecc.codegen.config import LayerShape
from moecc.errors import InputError
from moecc.solvers.routing import Routing


def shares_of(routings: Sequence[Routing]) -> tuple[float, ...]:
    """Shares of the experts, the most chosen first, averaged over layers and workloads; empty where no token is.

    Sorted before they are averaged: experts that are favourites in different layers are favourites all the same.
    """
    layers = [np.sort(routing.loads())[:, ::-1] for routing in routings if len(routing.topk_ids)]
    return tuple(float(share) for share in np.concatenate(layers).mean(axis=0)) if layers else ()


def routing_class(shares: Sequence[float]) -> str:
    """`uniform`, or `skew-2`, `skew-4` …: how many times fewer experts, chosen alike, would be as uneven.

    The power of two next to experts * sum(shares ** 2), the inverse of Simpson's effective number of species.
    """
    if not shares:
        return UNIFORM
    unevenness = len(shares) * sum(share * share for share in shares)
    power = round(math.log2(max(unevenness, 1.0)))
    return f"skew-{1 << power}" if power else UNIFORM


def local_shares(shares: Sequence[float], shape: LayerShape, where: str) -> tuple[float, ...]:
    """Those of the experts that a device holds, favourites and others as they come. InputError for another model's."""
    if not shares:
        return ()
    if len(shares) != shape.experts:
        raise InputError(
            f"it routes to {len(shares)} experts, the layer has {shape.experts}",
            where=where,
            hint="give a trace of this model",
        )
    held = shape.slots or shape.experts
    kept = [shares[slot * len(shares) // held] for slot in range(held)]
    return tuple(share / sum(kept) for share in kept)
