"""Which experts every token chose in every layer: what placement is solved and judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Routing:
    """The routing of one workload.

    topk_ids: int16 [tokens, layers, top_k], each token's experts distinct, in [0, num_experts).
    sequence_ids: int32 [tokens], the sequence each token belongs to; tokens of a sequence stand in order.
    assumption: empty for a recorded trace, else the sentence to print beside every figure that rests on it.
    homes: int32 [tokens], the device that each token's attention runs on; None: any, independent of its routing.
    """

    name: str
    topk_ids: NDArray[np.int16]
    num_experts: int
    sequence_ids: NDArray[np.int32]
    weight: float = 1.0
    assumption: str = ""
    homes: NDArray[np.int32] | None = None

    @property
    def layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    def loads(self) -> NDArray[np.float64]:
        """Fraction of the assignments that each expert receives: [layers, experts], every row sums to 1."""
        tokens, layers, k = self.topk_ids.shape
        offsets = np.arange(layers)[None, :, None] * self.num_experts
        counts = np.bincount((self.topk_ids + offsets).ravel(), minlength=layers * self.num_experts)
        loads: NDArray[np.float64] = counts.reshape(layers, self.num_experts) / (tokens * k)
        return loads

    def take(self, tokens: NDArray[np.bool_] | NDArray[np.int64]) -> Routing:
        """The routing of some of the tokens (a mask or indices)."""
        return replace(
            self,
            topk_ids=self.topk_ids[tokens],
            sequence_ids=self.sequence_ids[tokens],
            homes=None if self.homes is None else self.homes[tokens],
        )

    def split(self, seed: int = 0) -> tuple[Routing, Routing]:
        """Halves by whole sequences, for training and for scoring; a single sequence is cut in the middle."""
        sequences = np.unique(self.sequence_ids)
        if len(sequences) == 1:
            order = np.arange(len(self.sequence_ids))
            return self.take(order < len(order) // 2), self.take(order >= len(order) // 2)
        chosen = np.random.default_rng(seed).permutation(sequences)[: (len(sequences) + 1) // 2]
        train = np.isin(self.sequence_ids, chosen)
        return self.take(train), self.take(~train)


def assumed_routing(
    kind: str, *, layers: int, experts: int, top_k: int, alpha: float = 1.0, tokens: int = 4096, seed: int = 0
) -> Routing:
    """A routing that nobody measured, for models without a trace.

    `uniform` draws every expert alike; `zipf` draws the expert of rank r with weight r^-alpha, the ranks
    permuted anew in every layer. Experts of a token are distinct (Gumbel top-k sampling).
    """
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, top_k), np.int16)
    ranks = np.arange(1, experts + 1, dtype=np.float64)
    logits = -alpha * np.log(ranks) if kind == "zipf" else np.zeros(experts)
    for layer in range(layers):
        keys = rng.permutation(logits) + rng.gumbel(size=(tokens, experts))
        ids[:, layer] = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
    label = f"zipf, alpha {alpha:g}" if kind == "zipf" else "uniform"
    return Routing(
        name=kind,
        topk_ids=ids,
        num_experts=experts,
        sequence_ids=np.arange(tokens, dtype=np.int32) // 256,
        assumption=f"assumed routing ({label}), not measured",
    )
