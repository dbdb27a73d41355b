"""The layer in float64, written from the definitions: what kernels are judged against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moecc.codegen.config import LayerShape
from moecc.ir.semantics import Activation, Router

EDGE = 1e-4  # of sparsemixer's jitter: rounded logits may lie on the other side of it


@dataclass(frozen=True)
class Selection:
    """Scores that routing rests on, float64 [tokens, experts]: those that select, and those that weight."""

    selecting: Tensor
    weighting: Tensor


def logits(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Router logits in float64: x [tokens, hidden] -> [tokens, experts]."""
    scores = x.double() @ weights["gate"].double().T
    return scores + weights["router_bias"].double() if "router_bias" in weights else scores


def select(router: Router, scores: Tensor, correction_bias: Tensor | None) -> Selection:
    """Steps 1 to 3 of `Router`: experts outside the chosen groups select with -inf."""
    if router.select_first or router.score == "sparsemixer":
        return Selection(scores, scores)
    weighting = scores.sigmoid() if router.score == "sigmoid" else scores.softmax(-1)
    selecting = weighting + correction_bias.double() if correction_bias is not None else weighting
    if router.groups > 1:
        grouped = selecting.reshape(len(selecting), router.groups, -1)
        best = grouped.topk(2, -1).values.sum(-1) if router.group_score == "top2_sum" else grouped.amax(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter(
            -1, best.topk(router.top_groups, -1).indices, True
        )
        selecting = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)
    return Selection(selecting, weighting)


def routing_weights(router: Router, selection: Selection, ids: Tensor) -> Tensor:
    """Steps 4 and 5 of `Router` for given ids [tokens, top_k]: weights in float64."""
    if router.score == "sparsemixer":
        return _mixer_weights(router.jitter, selection.weighting, ids.long()) * router.scale
    chosen = selection.weighting.gather(-1, ids.long())
    if router.select_first:
        return (chosen.sigmoid() if router.score == "sigmoid" else chosen.softmax(-1)) * router.scale
    if router.normalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + router.norm_eps).clamp(min=router.norm_min)
    return chosen * router.scale


def nearest_weights(router: Router, selection: Selection, ids: Tensor, found: Tensor) -> Tensor:
    """`routing_weights`, where a logit on the edge of what sparsemixer finds near counts or not as in `found`."""
    exact = routing_weights(router, selection, ids)
    for factor in (1 - EDGE, 1 + EDGE) if router.jitter else ():
        other = routing_weights(replace(router, jitter=router.jitter * factor), selection, ids)
        exact = torch.where((other - found).abs() < (exact - found).abs(), other, exact)
    return exact


def _mixer_weights(jitter: float, logits: Tensor, ids: Tensor) -> Tensor:
    """Each expert's softmax among the logits near it that were not taken before it."""
    left, weights = logits.clone(), []
    for taken in ids.unbind(-1):
        best = left.gather(-1, taken[:, None])
        far = best - left > 2 * jitter * torch.maximum(left.abs(), best)
        near = left.masked_fill(far, -torch.inf).softmax(-1)
        weights.append(near.gather(-1, taken[:, None]))
        left = left.scatter(-1, taken[:, None], -torch.inf)
    return torch.cat(weights, -1)


def activate(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """`Activation` on gate and up [rows, intermediate]; without a gate, on `up` alone."""
    if activation.kind == "clamped_swiglu":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    squash = _FUNCTIONS[activation.function]
    return squash(gate) * up if activation.gated else squash(up)


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def experts(
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    weights: Mapping[str, Tensor],
    activation: Activation,
    *,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Sum over a token's experts of weight * down(activation(gate_up(x))): [tokens, hidden] in float64.

    Weights lie as `LayerShape` says. Differentiable in x, topk_weights and weights.
    """
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in torch.unique(ids).tolist():
        if not 0 <= expert < len(weights["gate_up"]):
            continue
        gate_up, down = weights["gate_up"][expert].double(), weights["down"][expert].double()
        if not transposed:
            gate_up, down = gate_up.T, down.T
        tokens, slots = torch.nonzero(ids == expert, as_tuple=True)
        pre = x[tokens].double() @ gate_up
        if "gate_up_bias" in weights:
            pre = pre + weights["gate_up_bias"][expert].double()
        rows = activate(activation, *_halves(pre, activation.gated, interleaved)) @ down
        if "down_bias" in weights:
            rows = rows + weights["down_bias"][expert].double()
        out = out.index_add(0, tokens, rows * topk_weights[tokens, slots, None].double())
    return out


def _halves(pre: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of pre [rows, columns]; without a gate both are all of it."""
    if not gated:
        return pre, pre
    if interleaved:
        return pre[:, ::2], pre[:, 1::2]
    gate, up = pre.chunk(2, -1)
    return gate, up


def selection_error(shape: LayerShape, selection: Selection, ids: Tensor) -> float:
    """By how much the worst selected expert falls short of the best one left out; 0 for a correct top-k.

    ids: [tokens, top_k + shared]. Rounding may swap two experts whose scores are all but equal: the shortfall is then
    tiny. Infinite for an expert that does not exist or stands twice, and for shared experts other than the last ones.
    """
    if not len(ids):
        return 0.0
    routed, shared = ids[:, : shape.top_k].long(), ids[:, shape.top_k :]
    in_range = ((routed >= 0) & (routed < shape.experts)).all()
    distinct = (torch.sort(routed, dim=-1).values.diff(dim=-1) > 0).all()
    everyone = torch.arange(shape.experts, shape.experts + shape.shared, device=ids.device)
    if not in_range or not distinct or not (shared == everyone).all():
        return torch.inf
    chosen = torch.zeros_like(selection.selecting, dtype=torch.bool).scatter(-1, routed, True)
    worst = selection.selecting.masked_fill(~chosen, torch.inf).amin(-1)
    best_left = selection.selecting.masked_fill(chosen, -torch.inf).amax(-1)
    return float((best_left - worst).clamp(min=0).max())
