"""Batches of token ids in the forms in which people's data loaders hand them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moecc.errors import InputError

if TYPE_CHECKING:
    import torch

_HINT = "a batch is token ids [sequences, length], a dict with input_ids, or a tuple that starts with either"


class Batch(NamedTuple):
    """input_ids int [sequences, length]; attention_mask of that shape, zero where nothing but padding is, or None."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def kept(self) -> torch.Tensor:
        """Which positions are tokens: bool [sequences, length]."""
        import torch

        if self.attention_mask is None:
            return torch.ones(self.input_ids.shape, dtype=torch.bool)
        return self.attention_mask.bool().cpu()


def batch_of(item: Any, number: int) -> Batch:
    """Item `number` of a data loader; one sequence without its batch dimension is a batch of one.

    Of a tuple or list only the first element is looked at: what follows are labels. Raises InputError for any other
    form.
    """
    import torch

    where, first = f"batch {number}", item
    if isinstance(item, (tuple, list)) and item and not isinstance(item[0], (int, float)):
        first = item[0]
    mask = None
    if isinstance(first, Mapping):
        if "input_ids" not in first:
            raise InputError(f"has no input_ids among {sorted(map(str, first))}", where=where, hint=_HINT)
        first, mask = first["input_ids"], first.get("attention_mask")
    for name, tensor in (("token ids", first), ("attention_mask", mask)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name}: a {type(tensor).__name__}, not a tensor", where=where, hint=_HINT)
    if first is None or first.is_floating_point() or first.is_complex() or first.dtype == torch.bool:
        raise InputError(f"holds no token ids but {_kind(first)}", where=where, hint=_HINT)
    if first.ndim not in (1, 2):
        raise InputError(f"token ids have {first.ndim} dimensions", where=where, hint=_HINT)
    if mask is not None and mask.shape != first.shape:
        what = f"attention_mask is {list(mask.shape)}, input_ids {list(first.shape)}"
        raise InputError(what, where=where, hint="give both one shape")
    ids = first if first.ndim == 2 else first[None]
    return Batch(ids, mask if mask is None else mask.reshape(ids.shape))


def _kind(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else str(tensor.dtype)
