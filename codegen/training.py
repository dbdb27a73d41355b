"""Host side of training: the experts of a layer forward, keeping what their gradients need, and backward."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import triton

from moecc.codegen.backward import IDENTITY, backward_constants
from moecc.codegen.frozen import Constants
from moecc.codegen.kernels.down import down_kernel
from moecc.codegen.kernels.grad_pre import grad_pre_kernel
from moecc.codegen.kernels.grad_weights import grad_bias_kernel, grad_weights_kernel
from moecc.codegen.large_memory import empty_like_weights
from moecc.codegen.launcher import Launcher, Plan, Weights, backend_of, combine_slots, expect, expert_count

Tensor = torch.Tensor
Gradients = dict[str, Tensor]

WANTED = frozenset(("x", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias"))
# What the first expert GEMM contributes to, and what the second one does.
_OF_GATE_UP = frozenset(("x", "gate_up", "gate_up_bias"))
_OF_DOWN = frozenset(("h", "topk_weights", "down", "down_bias"))


class TrainingLauncher(Launcher):
    """A launcher whose configs hold the kernels of the backward pass (`KernelConfigs.backward`).

    Arguments are those of `experts`. Rows [rows, ...] are in the order of the plan, which ids alone decide: a later
    call with the same ids finds them again. There are tokens * min(k, experts) of them, of which those past the ids in
    [0, experts) are never read and hold anything.
    Gradients have the dtype and layout of what they belong to; every element is written by one program, in an order
    that does not depend on timing. Ids outside [0, experts) have no gradient: their topk_weights get zero, as do the
    weights of experts without rows.
    """

    def experts_saving(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """(`experts`, pre [rows, columns]): what the activation is applied to, columns in the order of gate_up."""
        rows = self._rows(x)
        plan = self._plan_given(rows, topk_ids, topk_weights, expert_count(weights, "gate_up"))
        if plan is None:
            return torch.zeros_like(x), rows.new_empty((0, self.layer.columns))
        h, pre = self._gate_up(rows, plan, weights, keep_pre=True)
        return self._down(h, plan, weights).reshape(x.shape), pre

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
    ) -> Gradients:
        """The wanted gradients of <grad_out, experts(...)>, `wanted` among `WANTED`; pre None computes it again.

        Raises ValueError for a name that is not in `WANTED` or a tensor that does not fit.
        """
        _require(wanted, WANTED)
        rows, grad = self._rows(x), self._rows(grad_out)
        plan = self._plan_given(rows, topk_ids, topk_weights, expert_count(weights, "gate_up"))
        if plan is None:
            return _zeros(wanted, {**weights, "x": x, "topk_weights": topk_weights})
        back = wanted & _OF_DOWN | ({"h"} if wanted & _OF_GATE_UP else frozenset())
        recomputed = pre is None and bool(back - {"down_bias"})
        if recomputed:
            _, pre = self._gate_up(rows, plan, weights, keep_h=False, keep_pre=True)
        elif pre is not None:
            pre = self._given(pre, "pre", plan, self.layer.columns)
        found = self._down_backward(
            grad, pre, plan, weights, back, self.layer.activation, in_place=recomputed
        )
        if "h" in found:
            found |= self._gate_up_backward(found.pop("h"), rows, plan, weights, wanted & _OF_GATE_UP)
        return _shaped(found, x, topk_weights)

    def project(self, x: Tensor, topk_ids: Tensor, weights: Weights) -> Tensor:
        """pre [rows, columns]: each row's token through gate_up and its bias; the layer's activation is not applied."""
        rows = self._rows(x)
        plan = self._plan_given(rows, topk_ids, _unread(topk_ids), expert_count(weights, "gate_up"))
        if plan is None:
            return rows.new_empty((0, self.layer.columns))
        return self._gate_up(rows, plan, weights, keep_h=False, keep_pre=True)[1]

    def project_backward(
        self, grad_pre: Tensor, x: Tensor, topk_ids: Tensor, weights: Weights, *, wanted: frozenset[str]
    ) -> Gradients:
        """The gradients of <grad_pre, project(...)>, `wanted` among x, gate_up and gate_up_bias."""
        _require(wanted, _OF_GATE_UP)
        rows = self._rows(x)
        plan = self._plan_given(rows, topk_ids, _unread(topk_ids), expert_count(weights, "gate_up"))
        if plan is None:
            return _zeros(wanted, {**weights, "x": x})
        grad_pre = self._given(grad_pre, "grad_pre", plan, self.layer.columns)
        return _shaped(self._gate_up_backward(grad_pre, rows, plan, weights, wanted), x, x)

    def combine(self, h: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: Weights) -> Tensor:
        """[tokens, hidden]: h [rows, intermediate] through down and its bias, weighted, summed for each token."""
        plan = self._plan_given(topk_ids, topk_ids, topk_weights, expert_count(weights, "down"))
        if plan is None:
            return h.new_zeros((len(topk_ids), self.layer.hidden))
        return self._down(self._given(h, "h", plan, self.layer.intermediate), plan, weights)

    def combine_backward(
        self,
        grad_out: Tensor,
        h: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weights: Weights,
        *,
        wanted: frozenset[str],
    ) -> Gradients:
        """The gradients of <grad_out, combine(...)>, `wanted` among h, topk_weights, down and down_bias."""
        _require(wanted, _OF_DOWN)
        grad = self._rows(grad_out)
        plan = self._plan_given(grad, topk_ids, topk_weights, expert_count(weights, "down"))
        if plan is None:
            return _zeros(wanted, {**weights, "h": h, "topk_weights": topk_weights})
        h = self._given(h, "h", plan, self.layer.intermediate)
        found = self._down_backward(grad, h, plan, weights, wanted, IDENTITY)
        return _shaped(found, grad_out, topk_weights)

    def _given(self, rows: Tensor, name: str, plan: Plan, columns: int) -> Tensor:
        """Rows that the caller brings, in the plan's order."""
        tokens, slots = plan.topk_ids.shape
        expect(name, rows, (tokens * min(slots, _experts(plan)), columns))
        if rows.dtype != getattr(torch, self.layer.dtype):
            raise ValueError(f"{name} is {rows.dtype}, not {self.layer.dtype}")
        return rows.contiguous()

    def _down_backward(
        self,
        grad: Tensor,
        pre: Tensor | None,
        plan: Plan,
        weights: Weights,
        wanted: Collection[str],
        activation: Mapping[str, Any],
        *,
        in_place: bool = False,
    ) -> Gradients:
        """Gradients on this side of the activation, and as "h" that of `pre`, which may take its place."""
        layer, (tokens, slots) = self.layer, plan.topk_ids.shape
        names = {"h": "grad_pre", "down": "h", "topk_weights": "grad_weights"}
        keep = [kept for name, kept in names.items() if name in wanted]
        constants = self._backward_constants(plan, keep, activation)
        down, bias = self._expert_weights("down", weights, _experts(plan), (layer.hidden, layer.intermediate))
        found: Gradients = {}
        if pre is not None and keep:
            config = constants["grad_pre"]
            blocks = triton.cdiv(layer.intermediate, config["BLOCK_N"])
            grad_pre = pre if in_place or "h" not in wanted else torch.empty_like(pre)
            h = pre.new_empty((len(pre), layer.intermediate)) if "down" in wanted else pre
            # Slots of other devices' experts are nobody's rows, and nobody writes them.
            parts = plan.topk_weights.new_zeros((blocks if "topk_weights" in wanted else 0, tokens * slots))
            grid = (len(plan.tile_expert) * blocks,)
            tensors = (grad, down, bias, plan.topk_weights, pre, grad_pre, h, parts)
            grad_pre_kernel[grid](*tensors, *plan.tile_map, tokens * slots, **config)
            if "topk_weights" in wanted:
                found["topk_weights"] = parts.sum(0).view(tokens, slots)
            if "down" in wanted:
                found["down"] = self._outer(h, grad, down, plan, constants["grad_down"])
            if "h" in wanted:
                found["h"] = grad_pre
        if "down_bias" in wanted:
            found["down_bias"] = self._column_sums(grad, bias, plan, constants["grad_down_bias"])
        return found

    def _gate_up_backward(
        self, grad_pre: Tensor, rows: Tensor, plan: Plan, weights: Weights, wanted: Collection[str]
    ) -> Gradients:
        layer, constants = self.layer, self._backward_constants(plan)
        gate_up, bias = self._expert_weights(
            "gate_up", weights, _experts(plan), (layer.columns, layer.hidden)
        )
        found: Gradients = {}
        if "gate_up" in wanted:
            found["gate_up"] = self._outer(grad_pre, rows, gate_up, plan, constants["grad_gate_up"])
        if "gate_up_bias" in wanted:
            found["gate_up_bias"] = self._column_sums(grad_pre, bias, plan, constants["grad_gate_up_bias"])
        if "x" in wanted:
            found["x"] = self._grad_x(grad_pre, gate_up, plan, constants["grad_x"])
        return found

    def _grad_x(self, grad_pre: Tensor, gate_up: Tensor, plan: Plan, constants: Constants) -> Tensor:
        (tokens, slots), hidden = plan.topk_ids.shape, self.layer.hidden
        partial = grad_pre.new_empty((tokens * slots, hidden))
        out = grad_pre.new_empty((tokens, hidden))
        grid = (len(plan.tile_expert) * triton.cdiv(hidden, constants["BLOCK_N"]),)
        routing = (plan.topk_ids, plan.topk_weights, partial, out, out, *plan.tile_map, plan.counters, tokens)
        down_kernel[grid](grad_pre, gate_up, gate_up, *routing, **constants)
        combine_slots(partial, plan.topk_ids, out, out, self._constants(plan, _experts(plan))["combine"])
        return out

    def _outer(
        self, by_row: Tensor, by_token: Tensor, weights: Tensor, plan: Plan, constants: Constants
    ) -> Tensor:
        """The gradient of `weights` [experts, ...]: each expert's rows times their tokens' values."""
        gradient = empty_like_weights(weights)
        factors = (by_token, by_row) if constants["LEFT_BY_TOKEN"] else (by_row, by_token)
        blocks = triton.cdiv(constants["M"], constants["BLOCK_M"]) * triton.cdiv(
            constants["N"], constants["BLOCK_N"]
        )
        order = (plan.sorted_slots, plan.expert_offsets)
        grad_weights_kernel[(len(weights) * blocks,)](*factors, gradient, *order, **constants)
        return gradient

    def _column_sums(self, values: Tensor, bias: Tensor, plan: Plan, constants: Constants) -> Tensor:
        gradient = bias.new_empty(bias.shape)
        grid = (len(bias), triton.cdiv(constants["N"], constants["BLOCK_N"]))
        order = (plan.sorted_slots, plan.expert_offsets)
        grad_bias_kernel[grid](values, plan.topk_weights, gradient, *order, **constants)
        return gradient

    def _backward_constants(
        self, plan: Plan, keep: Collection[str] = (), activation: Mapping[str, Any] | None = None
    ) -> dict[str, Constants]:
        target = self._target(plan.topk_ids.device)
        if "grad_pre" not in self.configs[target]:
            raise RuntimeError(f"no configs of the backward pass for {target}: see training_configs")
        return backward_constants(
            self.layer,
            self.configs[target],
            slots=plan.topk_ids.shape[1],
            experts=_experts(plan),
            backend=backend_of(target),
            keep=keep,
            activation=activation,
        )


def _experts(plan: Plan) -> int:
    return len(plan.expert_offsets) - 1


def _unread(topk_ids: Tensor) -> Tensor:
    """In place of routing weights where no kernel reads them."""
    return torch.empty(topk_ids.shape, device=topk_ids.device)


def _require(wanted: frozenset[str], known: frozenset[str]) -> None:
    if unknown := wanted - known:
        raise ValueError(
            f"no gradient of {', '.join(sorted(unknown))}: it is one of {', '.join(sorted(known))}"
        )


def _zeros(wanted: frozenset[str], tensors: Weights) -> Gradients:
    return {name: torch.zeros_like(tensors[name]) for name in sorted(wanted)}


def _shaped(found: Gradients, x: Tensor, topk_weights: Tensor) -> Gradients:
    """x and topk_weights as the caller gave them."""
    if "x" in found:
        found["x"] = found["x"].reshape(x.shape)
    if "topk_weights" in found:
        found["topk_weights"] = found["topk_weights"].to(topk_weights.dtype)
    return found
