"""How much structure a routing has: load skew, experts chosen together, layers that predict the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.routing import Routing


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """One workload in figures; the tuples have one entry per layer, `adjacent_information_bits` one fewer.

    load_skew: load of the busiest expert over the mean load, 1 (balanced) to experts / top_k.
    load_entropy_bits: entropy of an assignment's expert; log2(experts) where the load is balanced.
    co_activation: how much oftener two tokens share a pair of experts than if every token drew its experts
        by the layer's loads alone; about 1 without structure (and exactly 1 by definition where top_k is 1).
    adjacent_information_bits: mutual information between a token's first-listed expert in a layer and in the
        next, Miller-Madow corrected. It is the top-1 choice only if the trace lists experts by weight.
    """

    name: str
    tokens: int
    sequences: int
    experts: int
    top_k: int
    load_skew: tuple[float, ...]
    load_entropy_bits: tuple[float, ...]
    co_activation: tuple[float, ...]
    adjacent_information_bits: tuple[float, ...]


def routing_stats(routing: Routing) -> RoutingStats:
    """The statistics of one workload of at least one token; cost grows with layers * (tokens * k^2 + experts^2).

    The corrections for few samples take tokens as independent; tokens of one sequence are not, so a trace of few
    sequences reads slightly too structured.
    """
    ids, experts = routing.topk_ids.astype(np.int64), routing.num_experts
    loads = routing.loads()
    first = ids[:, :, 0]
    return RoutingStats(
        name=routing.name,
        tokens=ids.shape[0],
        sequences=len(np.unique(routing.sequence_ids)),
        experts=experts,
        top_k=routing.top_k,
        load_skew=tuple(float(load.max() * experts) for load in loads),
        load_entropy_bits=tuple(_entropy_bits(load) for load in loads),
        co_activation=tuple(_co_activation(ids[:, layer], experts) for layer in range(routing.layers)),
        adjacent_information_bits=tuple(
            _mutual_information_bits(_joint_counts(first[:, layer], first[:, layer + 1], experts))
            for layer in range(routing.layers - 1)
        ),
    )


def _entropy_bits(probabilities: NDArray[np.float64]) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log2(positive)).sum())


def _joint_counts(a: NDArray[np.int64], b: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """How often each (a, b) occurs: [experts, experts]."""
    return (
        np.bincount(a * experts + b, minlength=experts * experts).reshape(experts, experts).astype(np.float64)
    )


def _mutual_information_bits(counts: NDArray[np.float64]) -> float:
    """Mutual information of rows and columns of a contingency table, in bits, never below zero.

    The plug-in estimate is too high by about (cells - rows - columns + 1) / (2 samples ln 2), counting what is
    occupied (Miller 1955, "Note on the bias of information estimates").
    """
    samples = counts.sum()
    rows, columns = counts.sum(1) / samples, counts.sum(0) / samples
    plug_in = _entropy_bits(rows) + _entropy_bits(columns) - _entropy_bits((counts / samples).ravel())
    occupied = np.count_nonzero(counts) - np.count_nonzero(rows) - np.count_nonzero(columns) + 1
    return max(0.0, plug_in - float(occupied / (2 * samples * np.log(2))))


def _co_activation(ids: NDArray[np.int64], experts: int) -> float:
    """Pairs of experts that two distinct tokens share, over the same for independent choices: ids [tokens, k].

    Counting only distinct tokens, n (n - 1) instead of n^2, keeps the estimate unbiased for few tokens.
    """
    tokens, k = ids.shape
    if k < 2 or tokens < 2:
        return 1.0
    left, right = np.triu_indices(k, 1)
    pairs = np.sort(np.stack([ids[:, left], ids[:, right]]), axis=0)
    together = np.triu(_joint_counts(pairs[0].ravel(), pairs[1].ravel(), experts), 1)
    shared = (together * (together - 1)).sum() / (tokens * (tokens - 1))
    used = np.bincount(ids.ravel(), minlength=experts) / tokens
    independent = np.triu(np.outer(used, used), 1)
    independent *= k * (k - 1) / 2 / independent.sum()
    return float(shared / (independent**2).sum())
