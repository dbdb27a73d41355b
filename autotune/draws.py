"""Routings that a layer is timed with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moecc.codegen.config import LayerShape

# A share of 0 would never be drawn, and a token needs top_k experts.
LEAST_SHARE = 1e-6


class Draw(NamedTuple):
    """x [rows, hidden]; ids int32 and topk_weights [rows, top_k + shared], those of a token sum to 1."""

    x: torch.Tensor
    ids: torch.Tensor
    topk_weights: torch.Tensor


def draw_routing(
    shape: LayerShape, number: int, shares: tuple[float, ...], generator: torch.Generator, device: str
) -> Draw:
    """One of a series: few tokens of a uniform routing take experts in turn, so that weights come from memory."""
    tokens = shape.expert_tokens
    experts = shape.slots or shape.experts
    chosen = min(shape.top_k, experts)
    if shares:
        weights = torch.tensor(shares, dtype=torch.float64).clamp(min=LEAST_SHARE)
        ids = torch.multinomial(weights.expand(tokens, -1), chosen, generator=generator)
    elif tokens == 1:
        ids = (torch.arange(chosen) + number * chosen).remainder(experts)[None]
    else:
        ids = torch.rand(tokens, experts, generator=generator).topk(chosen, dim=1).indices
    if shape.received:
        ids = _only_here(ids, shape, experts, generator)
    shared = torch.arange(experts, experts + shape.shared).expand(tokens, -1)
    topk_weights = torch.rand(tokens, chosen, generator=generator)
    topk_weights /= topk_weights.sum(dim=1, keepdim=True)
    x = torch.randn(tokens, shape.hidden, generator=generator).to(getattr(torch, shape.dtype))
    return Draw(
        x.to(device),
        torch.cat((ids, shared), 1).int().to(device),
        torch.cat((topk_weights, torch.ones(tokens, shape.shared)), 1).to(device),
    )


def _only_here(
    ids: torch.Tensor, shape: LayerShape, experts: int, generator: torch.Generator
) -> torch.Tensor:
    """Of each received token the first choices only, as many on average as bring the rows that a device gets.

    The others are no expert's, `experts + shared`: another device computes them.
    """
    each = shape.tokens * shape.top_k / shape.expert_tokens
    kept = (each + torch.rand(len(ids), 1, generator=generator)).floor().clamp(1, ids.shape[1])
    places = torch.arange(ids.shape[1])
    return torch.where(places < kept, ids, experts + shape.shared)
