"""The ranks of a placement, played in turn by one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moecc.runtime.load import Weights

if TYPE_CHECKING:
    from torch import Tensor

PER_EXPERT = ("gate_up", "down", "gate_up_bias", "down_bias")


class Share(NamedTuple):
    """One rank's part of a batch: the tokens that reach it [n], which of its slots they selected [n, top_k] with -1 for
    experts elsewhere, and the weights of its slots."""

    tokens: Tensor
    local_ids: Tensor
    weights: Weights


@dataclass(frozen=True)
class Ranks:
    """slots: int [devices, slots_per_device], the expert in every slot. weights: of each device's slots."""

    slots: np.ndarray[Any, np.dtype[np.int64]]
    weights: tuple[Weights, ...]

    @staticmethod
    def of(placement: Mapping[str, Any], row: int, weights: Weights) -> Ranks:
        """Ranks of the layer in row `row` of the placement, each with a copy of its experts' weights."""
        slots = np.asarray(placement["physical_to_logical_map"][row], np.int64).reshape(
            placement["devices"], -1
        )
        own = tuple(
            {name: tensor[held] if name in PER_EXPERT else tensor for name, tensor in weights.items()}
            for held in slots.tolist()
        )
        return Ranks(slots, own)

    @property
    def devices(self) -> int:
        return len(self.slots)

    def shares(self, ids: Tensor) -> Iterator[Share]:
        """Every rank's part of a batch with ids [tokens, top_k]; of n replicas token t takes number t mod n."""
        import torch

        replicas: dict[int, list[tuple[int, int]]] = {}
        for device, held in enumerate(self.slots.tolist()):
            for slot, expert in enumerate(held):
                replicas.setdefault(expert, []).append((device, slot))
        places = [[replicas[e][t % len(replicas[e])] for e in row] for t, row in enumerate(ids.tolist())]
        where = torch.tensor(places, dtype=torch.int32, device=ids.device).reshape(*ids.shape, 2)
        for device in range(self.devices):
            here = where[..., 0] == device
            tokens = torch.nonzero(here.any(-1)).flatten()
            local = torch.where(here, where[..., 1], -1)[tokens].to(torch.int32)
            yield Share(tokens, local, self.weights[device])
