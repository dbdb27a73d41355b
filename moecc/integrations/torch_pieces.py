"""Stand-in for the kernels that the launcher does not have yet: the experts in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


class TorchLauncher:
    """`Launcher`'s experts in torch operations."""

    def __init__(self, kind: str, alpha: float, limit: float, transposed: bool, interleaved: bool) -> None:
        self.kind, self.alpha, self.limit = kind, alpha, limit
        self.transposed, self.interleaved = transposed, interleaved

    def experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: Weights) -> Tensor:
        with torch.no_grad():
            pre = self._pre(x.detach(), topk_ids, {n: w.detach() for n, w in weights.items()})
            return self._rest(pre, topk_ids, topk_weights, weights).to(x.dtype)

    def experts_saving(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pre = self._pre(x, topk_ids, weights)
            return self._rest(pre, topk_ids, topk_weights, weights).to(x.dtype), pre.to(x.dtype)

    def experts_backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weights: Weights,
        pre: Tensor | None,
        *,
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        # in a thread of its own: an op runs below autograd
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._backward, grad_out, x, topk_ids, topk_weights, weights, wanted).result()

    def _backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weights: Weights,
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        names = sorted(wanted)
        with torch.enable_grad():
            leaves: dict[str, Any] = {
                n: t.detach().float().requires_grad_(True)
                for n, t in {"x": x, "topk_weights": topk_weights, **weights}.items()
            }
            pre = self._pre(leaves["x"], topk_ids, leaves)
            out = self._rest(pre, topk_ids, leaves["topk_weights"], leaves)
            grads = torch.autograd.grad(
                out, [leaves[n] for n in names], grad_out.float(), allow_unused=True, materialize_grads=True
            )
        return {n: g.contiguous() for n, g in zip(names, grads, strict=True)}

    def _matrix(self, weights: Weights, name: str) -> Tensor:
        matrix = weights[name].float()
        return matrix if self.transposed else matrix.transpose(1, 2)

    def _pre(self, x: Tensor, ids: Tensor, weights: Weights) -> Tensor:
        matrix = self._matrix(weights, "gate_up")
        rows = x.float().repeat_interleave(ids.shape[1], 0)
        out = x.new_zeros((len(rows), matrix.shape[2]), dtype=torch.float32)
        return self._grouped(rows, ids, matrix, weights.get("gate_up_bias"), out)

    def _rest(self, pre: Tensor, ids: Tensor, topk_weights: Tensor, weights: Weights) -> Tensor:
        h, matrix = self._act(pre.float()), self._matrix(weights, "down")
        out = h.new_zeros((len(h), matrix.shape[2]))
        out = self._grouped(h, ids, matrix, weights.get("down_bias"), out)
        return (out.view(*ids.shape, -1) * topk_weights.float()[..., None]).sum(1)

    @staticmethod
    def _grouped(rows: Tensor, ids: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        for expert in flat.unique().tolist():
            if 0 <= expert < len(matrix):
                at = (flat == expert).nonzero()[:, 0]
                found = rows[at] @ matrix[expert]
                out = out.index_add(0, at, found if bias is None else found + bias[expert].float())
        return out

    def _act(self, pre: Tensor) -> Tensor:
        if not self.kind.endswith("glu"):
            return ACTIVATIONS[self.kind](pre)
        gate, up = (pre[:, ::2], pre[:, 1::2]) if self.interleaved else pre.chunk(2, 1)
        if self.kind == "clamped_swiglu":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        return ACTIVATIONS[self.kind.removesuffix("_glu")](gate) * up
