"""Batches of tokens as a serving engine would see them: drawn from many sequences at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.routing import Routing

BATCHES = 32
"""Batches of a workload that CVaR is taken over: the worst tenth is then the mean of 3.2 of them."""


def draw_batches(routing: Routing, *, count: int, batch_tokens: int, seed: int) -> NDArray[np.int64]:
    """Token indices of seeded batches: int64 [count, batch_tokens].

    A batch takes one token of each of batch_tokens distinct sequences. A trace of fewer sequences gives each of them
    batch_tokens // sequences tokens, and the rest one more to sequences drawn at random; tokens of a sequence are
    drawn with replacement, as a sequence may be shorter than that.
    """
    rng = np.random.default_rng([seed, batch_tokens, count])
    order = np.argsort(routing.sequence_ids, kind="stable")
    lengths = np.unique(routing.sequence_ids, return_counts=True)[1]
    first = np.cumsum(lengths) - lengths
    sequences = len(lengths)
    full, rest = divmod(batch_tokens, sequences)
    every = np.repeat(np.arange(sequences), full)
    chosen = np.array([np.append(every, rng.permutation(sequences)[:rest]) for _ in range(count)], np.int64)
    offset = (rng.random(chosen.shape) * lengths[chosen]).astype(np.int64)
    return np.asarray(order[first[chosen] + offset], np.int64)
