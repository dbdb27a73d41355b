"""Runs one MoE layer of an artifact with its own kernels and, on request, checks it against the reference."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moecc.artifact import Artifact
from moecc.codegen.config import LayerShape
from moecc.codegen.layers import KernelSet, kernel_set, kernel_sets
from moecc.errors import InputError, MoeccError
from moecc.ir.core import Function, Module
from moecc.ir.parser import parse_module
from moecc.ir.types import DTYPE_BYTES
from moecc.runtime.load import Kernels, best_device, free_bytes, load_kernels

if TYPE_CHECKING:
    from torch import Tensor

FINAL_IR = "ir/05-lower.moe"
# Root-mean-square error of the output relative to the reference that rounding alone explains: hidden rows,
# partial sums and output are each rounded once to the dtype, and fp32 accumulates in another order.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
SELECTION_TOLERANCE = 1e-4  # shortfall of a selected score, for two experts that all but tie


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `moecc run` reports; errors are None without a check.

    devices: ranks whose shares were computed, in turn, in this process. time_ms: one call, all ranks together.
    """

    function: str
    tokens: int
    device: str
    backend: str
    launches: int
    devices: int
    time_ms: float
    relative_error: float | None = None
    max_abs_error: float | None = None
    selection_error: float | None = None
    tolerance: float | None = None

    @property
    def passed(self) -> bool | None:
        if self.relative_error is None or self.selection_error is None or self.tolerance is None:
            return None
        return self.relative_error <= self.tolerance and self.selection_error <= SELECTION_TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What one run needs: kernels, random weights of all experts, and who holds which expert."""

    function: Function
    shape: LayerShape
    kernels: Kernels
    weights: Mapping[str, Tensor]
    shared: tuple[Kernels, Mapping[str, Tensor], LayerShape] | None
    slots_of: list[list[int]] | None


def run_artifact(artifact: Artifact, *, tokens: int, check: bool, seed: int = 0) -> RunResult:
    """Runs the first MoE layer, compiled for the phase that suits `tokens`, on random weights drawn from `seed`.

    With several devices every rank's share is computed in turn in this process under the artifact's placement,
    and summed. Raises InputError for a bad artifact or token count, MoeccError where memory does not suffice.
    """
    import torch

    if tokens < 1:
        raise InputError(f"--tokens {tokens} is not positive", hint="run at least one token")
    module = parse_module(artifact.read(FINAL_IR), FINAL_IR)
    device, backend = best_device()
    generator = torch.Generator().manual_seed(seed)
    layer = _load_layer(artifact, module, tokens, device, generator)
    dtype = getattr(torch, layer.shape.dtype)
    x = torch.randn(tokens, layer.shape.hidden, generator=generator).to(dtype).to(device)
    if device == "cuda":
        _forward(layer, x)
        torch.cuda.synchronize()
    start = time.perf_counter()
    ids, topk_weights, out = _forward(layer, x)
    if device == "cuda":
        torch.cuda.synchronize()
    result = RunResult(
        function=layer.function.name,
        tokens=tokens,
        device=device,
        backend=backend,
        launches=len(layer.kernels.launches(tokens)),
        devices=len(layer.slots_of or [0]),
        time_ms=(time.perf_counter() - start) * 1e3,
    )
    return _checked(result, layer, x, ids, topk_weights, out) if check else result


def _load_layer(artifact: Artifact, module: Module, tokens: int, device: str, generator: Any) -> _Layer:
    sets = kernel_sets(module)
    function, kernels = _function_for(module, sets, tokens)
    apart = kernel_set(sets, function, "_shared")
    needed = sum(_weight_bytes(s.shape) for s in (kernels, apart) if s)
    free = free_bytes(device)
    if needed * 2 > free:
        raise MoeccError(
            f"the layer's weights need {needed * 2 / 1e9:.1f} GB with their working copy, {free / 1e9:.1f} GB are free",
            where=str(artifact.folder),
            hint="run on a machine with more memory, or compile a smaller model",
        )
    shared = None
    if apart:
        shared_kernels = load_kernels(artifact, apart, device)
        shared = (shared_kernels, random_weights(apart.shape, generator, device), apart.shape)
    placement = module.attributes.get("placement")
    slots_of = None
    if placement and kernels.entry == "distributed":
        rows = np.asarray(placement["physical_to_logical_map"][0])
        slots_of = rows.reshape(placement["devices"], -1).tolist()
    return _Layer(
        function=function,
        shape=kernels.shape,
        kernels=load_kernels(artifact, kernels, device),
        weights=random_weights(kernels.shape, generator, device),
        shared=shared,
        slots_of=slots_of,
    )


def _function_for(module: Module, sets: list[KernelSet], tokens: int) -> tuple[Function, KernelSet]:
    """The MoE function of the smallest phase that holds `tokens`, else of the largest."""
    pairs = [(f, s) for f in module.functions if (s := kernel_set(sets, f)) is not None]
    if not pairs:
        raise InputError(
            "the artifact has no kernels", where=FINAL_IR, hint="compile a model with MoE layers"
        )
    sized = sorted(pairs, key=lambda pair: int(pair[0].attributes["tokens"]))
    return next((p for p in sized if p[0].attributes["tokens"] >= tokens), sized[-1])


def _weight_bytes(shape: LayerShape) -> int:
    return (shape.experts + shape.shared) * 3 * shape.hidden * shape.intermediate * DTYPE_BYTES[shape.dtype]


def random_weights(shape: LayerShape, generator: Any, device: str) -> dict[str, Tensor]:
    """Weights of all experts, normal with variance 1 / inputs; biases normal with deviation 0.1."""
    import torch

    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float) -> Tensor:
        values = torch.empty(size, dtype=dtype)
        for part in torch.split(values.view(-1, size[-1]), 1 << 14):
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        return values.to(device)

    experts, hidden, inner = shape.experts + shape.shared, shape.hidden, shape.intermediate
    weights = {
        "gate": normal(shape.experts, hidden, scale=hidden**-0.5),
        "gate_up": normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down": normal(experts, hidden, inner, scale=inner**-0.5),
    }
    if shape.has_router_bias:
        weights["router_bias"] = normal(shape.experts, scale=0.1)
    if shape.router.selection_bias:
        weights["correction_bias"] = normal(shape.experts, scale=0.1).float()
    if shape.has_expert_bias:
        weights["gate_up_bias"] = normal(experts, 2 * inner, scale=0.1)
        weights["down_bias"] = normal(experts, hidden, scale=0.1)
    return weights


def _forward(layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, output): routed at home, computed by the rank that holds each expert, summed at home."""
    import torch

    ids, topk_weights = layer.kernels.route(x, layer.weights)
    if layer.slots_of is None:
        return ids, topk_weights, layer.kernels.forward(x, layer.weights)
    total = torch.zeros(x.shape, device=x.device)
    computed = np.zeros(layer.shape.experts, bool)
    for held in layer.slots_of:
        local = torch.full((layer.shape.experts,), -1, dtype=torch.int32, device=x.device)
        for slot, expert in enumerate(held):
            if not computed[expert]:
                local[expert] = slot
                computed[expert] = True
        own = {
            name: tensor[held] if name in ("gate_up", "down", "gate_up_bias", "down_bias") else tensor
            for name, tensor in layer.weights.items()
        }
        total += layer.kernels.experts(x, local[ids.long()], topk_weights, own).float()
    return ids, topk_weights, (total + _shared_sum(layer, x)).to(x.dtype)


def _shared_sum(layer: _Layer, x: Tensor) -> Tensor:
    import torch

    if layer.shared is None:
        return torch.zeros((), device=x.device)
    kernels, weights, shape = layer.shared
    ids = torch.arange(shape.experts, dtype=torch.int32, device=x.device).expand(len(x), -1)
    return kernels.experts(x, ids, torch.ones(ids.shape, device=x.device), weights).float()


def _checked(
    result: RunResult, layer: _Layer, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor
) -> RunResult:
    """The routing is judged by its scores, the output against the reference for that very routing."""
    from moecc.runtime import reference

    shape, weights = layer.shape, layer.weights
    selection = reference.select(shape.router, reference.logits(x, weights), weights.get("correction_bias"))
    routed = ids[:, : shape.top_k]
    exact = reference.routing_weights(shape.router, selection, routed)
    all_weights = topk_weights.double().clone()
    weight_error = float((all_weights[:, : shape.top_k] - exact).abs().max())
    all_weights[:, : shape.top_k] = exact
    expected = reference.experts(x, ids, all_weights, weights, shape.activation)
    if layer.shared is not None:
        _, shared_weights, shared_shape = layer.shared
        everyone = ids.new_tensor(range(shared_shape.experts)).expand(len(x), -1)
        ones = everyone.double() * 0 + 1
        expected += reference.experts(x, everyone, ones, shared_weights, shared_shape.activation)
    difference = out.double() - expected
    return replace(
        result,
        relative_error=float(difference.norm() / expected.norm()),
        max_abs_error=float(difference.abs().max()),
        selection_error=max(reference.selection_error(shape, selection, ids), weight_error),
        tolerance=TOLERANCE[shape.dtype],
    )
