"""How local a routing is in time: would a few experts kept at hand serve the next tokens?

Both metrics are those of Liang et al., "Not All Models Suit Expert Offloading: On Local Routing Consistency of
Mixture-of-Expert Models" (arXiv:2505.16056v4, ICLR 2026; sections 2.2 and 2.3, appendix C.1). Version 1 of that
paper defined SCH otherwise, by a fixed set of experts for every segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError
from moecc.solvers.routing import Routing

SEGMENT_TOKENS = 16
CACHE_RATIO = 2.0
MAX_CACHE_TOKENS = 8192
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Locality:
    """One workload; the tuples have one entry per layer.

    segment_tokens: the segment length m, at most the longest sequence.
    srp: segment routing best performance, 0 to 1: the best F1 with which a router that decides once for every run of
        m tokens which experts to activate can mimic the traced router; all runs of all sequences count.
    srp_size_ratio: experts that this best segment router activates, over top_k; small is local.
    sch: segment cache best hit rate, 0 to 1, of a cache of cache_experts experts that evicts those that the segment
        of m tokens needs least.
    sch_tokens: tokens that sch was simulated on; whole sequences from the front of a longer trace.
    """

    segment_tokens: int
    srp: tuple[float, ...]
    srp_size_ratio: tuple[float, ...]
    cache_experts: int
    sch: tuple[float, ...]
    sch_tokens: int


def locality(
    routing: Routing, *, segment_tokens: int = SEGMENT_TOKENS, cache_ratio: float = CACHE_RATIO
) -> Locality:
    """SRP and SCH of every layer. cache_ratio: experts in the cache over top_k; the paper finds 2 the best balance.

    Raises InputError for a segment shorter than one token or a cache of fewer than top_k experts.
    """
    if segment_tokens < 1 or cache_ratio < 1:
        raise InputError(
            f"segments of {segment_tokens} tokens and a cache of {cache_ratio:g} x top_k experts",
            where=f"workload {routing.name!r}",
            hint="use segments of at least 1 token and a cache of at least 1 x top_k",
        )
    routing = routing.take(np.argsort(routing.sequence_ids, kind="stable"))
    starts, lengths = _sequences(routing.sequence_ids)
    segment = min(segment_tokens, int(lengths.max()))
    size = min(routing.num_experts, round(cache_ratio * routing.top_k))
    best = [
        _srp(routing.topk_ids[:, layer], routing.num_experts, starts, lengths, segment)
        for layer in range(routing.layers)
    ]
    kept = max(1, int(np.searchsorted(np.cumsum(lengths), MAX_CACHE_TOKENS, side="right")))
    cut = np.minimum(lengths[:kept], MAX_CACHE_TOKENS)
    return Locality(
        segment_tokens=segment,
        srp=tuple(f1 for f1, _ in best),
        srp_size_ratio=tuple(ratio for _, ratio in best),
        cache_experts=size,
        sch=tuple(float(rate) for rate in _sch(routing, starts[:kept], cut, segment, size)),
        sch_tokens=int(cut.sum()),
    )


def _sequences(sequence_ids: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token and length of every run of equal ids."""
    edges = np.flatnonzero(np.diff(sequence_ids)) + 1
    starts = np.concatenate([[0], edges])
    return starts, np.diff(np.append(starts, len(sequence_ids)))


def _srp(
    ids: NDArray[np.int16],
    experts: int,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    segment: int,
) -> tuple[float, float]:
    """(SRP, its size ratio) of the experts of one layer as a group: ids [tokens, top_k].

    The best segment router activates an expert in a segment exactly if the segment needs it at least alpha times, the
    same alpha for all experts (the paper's equation 6); so a histogram of those needs says everything.
    """
    long = lengths >= segment
    seen = np.zeros(segment + 1, np.int64)
    for start, length in zip(starts[long], lengths[long], strict=True):
        seen += _needs(ids[start : start + length], experts, segment)
    needs = np.arange(segment + 1)
    matches, active = (seen * needs)[::-1].cumsum()[::-1], segment * seen[::-1].cumsum()[::-1]
    f1 = 2 * matches / (active + matches[0])
    alpha = int(f1.argmax())
    return float(f1[alpha]), float(active[alpha] / matches[0])


def _needs(ids: NDArray[np.int16], experts: int, segment: int) -> NDArray[np.int64]:
    """Of one sequence: how many (segment, expert) pairs need the expert 0, 1, ... segment times: [segment + 1]."""
    seen = np.zeros(segment + 1, np.int64)
    step = max(1, _PAIRS_AT_ONCE // experts)
    for first in range(0, len(ids) - segment + 1, step):
        part = ids[first : first + step + segment - 1].astype(np.int64)
        chosen = np.zeros((len(part) + 1, experts), np.int32)
        np.put_along_axis(chosen[1:], part, 1, 1)
        total = chosen.cumsum(axis=0)
        seen += np.bincount((total[segment:] - total[:-segment]).ravel(), minlength=segment + 1)
    return seen


def _sch(
    routing: Routing, starts: NDArray[np.int64], lengths: NDArray[np.int64], segment: int, size: int
) -> NDArray[np.float64]:
    """Hit rate of every layer's cache: [layers]. Every sequence begins with an empty cache.

    A token's missing experts are loaded, and as many that it does not use are evicted: those needed by the fewest of
    the segment's tokens, beginning with this one; ties to the least recently used, then to the lowest id. Loading
    into a free place is no miss, as in the authors' code (github.com/ljcleo/moe-lrc, src/41_sch_calc.py): it could
    be preloaded.
    """
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    layers, k, experts = routing.layers, routing.top_k, routing.num_experts
    shape = (len(starts), layers, experts)
    cached, ahead = np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
    used = np.zeros(shape, np.int32)
    for offset in range(segment - 1):
        running = int((lengths > offset).sum())
        _count(ahead[:running], routing.topk_ids[starts[:running] + offset], 1)
    misses = np.zeros(layers, np.int64)
    for now in range(int(lengths[0])):
        entering = int((lengths > now + segment - 1).sum())
        _count(ahead[:entering], routing.topk_ids[starts[:entering] + now + segment - 1], 1)
        running = int((lengths > now).sum())
        chosen = routing.topk_ids[starts[:running] + now].astype(np.int64)
        misses += _serve(cached[:running], ahead[:running], used[:running], chosen, size).sum(axis=0)
        np.put_along_axis(used[:running], chosen, now + 1, 2)
        _count(ahead[:running], chosen, -1)
    return np.asarray(1 - misses / (lengths.sum() * k))


def _serve(
    cached: NDArray[np.bool_],
    ahead: NDArray[np.int32],
    used: NDArray[np.int32],
    chosen: NDArray[np.int64],
    size: int,
) -> NDArray[np.int64]:
    """Put the chosen experts [sequences, layers, top_k] into the caches; returns evictions [sequences, layers]."""
    np.put_along_axis(cached, chosen, True, 2)
    evict = np.maximum(0, cached.sum(axis=2) - size)
    most = int(evict.max(initial=0))
    if most:
        key = ahead.astype(np.int64) << 32 | used
        key[~cached] = np.iinfo(np.int64).max
        np.put_along_axis(key, chosen, np.iinfo(np.int64).max, 2)
        victims = np.argsort(key, axis=2, kind="stable")[:, :, :most]
        keep = np.arange(most) >= evict[:, :, None]
        np.put_along_axis(cached, victims, np.take_along_axis(cached, victims, 2) & keep, 2)
    return np.asarray(evict)


def _count(ahead: NDArray[np.int32], chosen: NDArray[np.int16] | NDArray[np.int64], change: int) -> None:
    index = chosen.astype(np.int64)
    np.put_along_axis(ahead, index, np.take_along_axis(ahead, index, 2) + change, 2)
