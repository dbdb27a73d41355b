"""Runs one MoE layer of an artifact with its own kernels and, on request, checks it against the reference."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from moecc.artifact import Artifact
from moecc.codegen.config import LayerShape
from moecc.codegen.layers import KernelSet, kernel_set, kernel_sets
from moecc.errors import InputError, MoeccError
from moecc.ir.core import Function, Module
from moecc.ir.parser import parse_module
from moecc.ir.types import DTYPE_BYTES
from moecc.runtime.load import Kernels, Weights, best_device, free_bytes, load_kernels
from moecc.runtime.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

# Root-mean-square error of the output relative to the reference that rounding alone explains: hidden rows,
# partial sums and output are each rounded once to the dtype, and fp32 accumulates in another order.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
MAX_TOKENS = 1 << 20
SELECTION_TOLERANCE = 1e-4  # shortfall of a selected score, for two experts that all but tie


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `moecc run` reports; errors are None without a check.

    devices: ranks whose shares were computed, in turn, in this process. launches: of all ranks together.
    time_ms: one call on all ranks together, weights in place.
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
        """Plain data; a figure that is not finite is null, as JSON has none."""
        plain = {name: None if _is_odd(value) else value for name, value in asdict(self).items()}
        return {**plain, "passed": self.passed}


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Shared experts that run apart: every token selects all of them, with weight 1 or by a gate."""

    kernels: Kernels
    shape: LayerShape
    weights: Weights
    gated: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.kernels.forward(x, self.weights)
        everyone = self.everyone(x)
        return self.kernels.experts(x, everyone, everyone.new_ones(everyone.shape).float(), self.weights)

    def everyone(self, x: Tensor) -> Tensor:
        """Ids of all shared experts for each token, [tokens, count] int32."""
        import torch

        ids = torch.arange(self.shape.experts, dtype=torch.int32, device=x.device)
        return ids.repeat(len(x), 1)

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` should give, in float64."""
        from moecc.runtime import reference

        everyone = self.everyone(x)
        ones = everyone.double().fill_(1.0)
        weight = reference.logits(x, self.weights).sigmoid() if self.gated else ones
        return reference.experts(x, everyone, weight, self.weights, self.shape.activation)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one run needs: kernels, random weights of all experts, and the ranks that hold them (none: one device)."""

    function: Function
    shape: LayerShape
    kernels: Kernels
    weights: Weights
    shared: Shared | None
    ranks: Ranks | None


def run_artifact(artifact: Artifact, *, tokens: int, check: bool, seed: int = 0) -> RunResult:
    """Runs the first MoE layer, compiled for the phase that suits `tokens`, on random weights drawn from `seed`.

    With several devices every rank's share is computed in turn in this process under the artifact's placement: it
    gets the tokens that selected its experts, replicas take turns, and the sums are added. Token chunks of the
    schedule are not run apart. Raises InputError for a bad artifact or token count, MoeccError where memory does not
    suffice.
    """
    import torch

    for flag, value, low, high in (("--tokens", tokens, 1, MAX_TOKENS), ("--seed", seed, 0, (1 << 63) - 1)):
        if not low <= value <= high:
            raise InputError(f"{value} is out of range", where=flag, hint=f"it must be in [{low}, {high}]")
    device, backend = best_device()
    generator = torch.Generator().manual_seed(seed)
    layer = _load_layer(artifact, tokens, (device, backend), generator)
    dtype = getattr(torch, layer.shape.dtype)
    x = torch.randn(tokens, layer.shape.hidden, generator=generator).to(dtype).to(device)
    if backend != "interpret":
        _forward(layer, x)  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    done = _forward(layer, x)
    if device == "cuda":
        torch.cuda.synchronize()
    result = RunResult(
        function=layer.function.name,
        tokens=tokens,
        device=device,
        backend=backend,
        launches=done.launches,
        devices=layer.ranks.devices if layer.ranks else 1,
        time_ms=(time.perf_counter() - start) * 1e3,
    )
    return _checked(result, layer, x, done) if check else result


def _load_layer(artifact: Artifact, tokens: int, where: tuple[str, str], generator: Any) -> Layer:
    device, backend = where
    final = max((name for name in artifact.manifest["files"] if name.startswith("ir/")), default="")
    if not final:
        raise InputError("the artifact holds no IR", where=str(artifact.folder), hint="compile again")
    module = parse_module(artifact.read(final), final)
    sets = kernel_sets(module)
    function, kernels = _function_for(module, sets, tokens)
    apart = kernel_set(sets, function, "_shared")
    distributed = kernels.entry == "distributed"
    _require_memory(artifact, [kernels.shape, *([apart.shape] if apart else [])], distributed, device)
    weights = random_weights(kernels.shape, generator, device)
    shared = None
    if apart:
        shared_weights = random_weights(apart.shape, generator, device)
        shared = Shared(
            kernels=load_kernels(artifact, apart, backend),
            shape=apart.shape,
            weights=shared_weights,
            gated=apart.entry == "forward",
        )
    return Layer(
        function=function,
        shape=kernels.shape,
        kernels=load_kernels(artifact, kernels, backend),
        weights=weights,
        shared=shared,
        ranks=Ranks.of(module.attributes["placement"], weights) if distributed else None,
    )


def _function_for(module: Module, sets: Sequence[KernelSet], tokens: int) -> tuple[Function, KernelSet]:
    """The MoE function of the smallest phase that holds `tokens`, else of the largest."""
    pairs = [(f, s) for f in module.functions if (s := kernel_set(sets, f)) is not None]
    if not pairs:
        where, hint = f"module @{module.name}", "compile a model with MoE layers"
        raise InputError("the artifact has no kernels", where=where, hint=hint)
    sized = sorted(pairs, key=lambda pair: int(pair[0].attributes["tokens"]))
    return next((p for p in sized if p[0].attributes["tokens"] >= tokens), sized[-1])


def _require_memory(artifact: Artifact, shapes: Sequence[LayerShape], distributed: bool, device: str) -> None:
    """Weights once, and once more as the copies of the ranks."""
    copies = 2 if distributed else 1
    needed, free = copies * sum(map(_weight_bytes, shapes)), free_bytes(device)
    if needed > 0.9 * free:
        raise MoeccError(
            f"the layer's weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(artifact.folder),
            hint="run on a machine with more memory, or compile a smaller model",
        )


def _weight_bytes(shape: LayerShape) -> int:
    experts = shape.experts + shape.shared
    columns = shape.gate_up_columns + shape.intermediate
    return experts * columns * shape.hidden * DTYPE_BYTES[shape.dtype]


def random_weights(shape: LayerShape, generator: Any, device: str) -> Weights:
    """Weights of all experts, normal with variance 1 / inputs; biases normal with deviation 0.1."""
    import torch

    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float) -> Tensor:
        values = torch.empty(size, dtype=dtype)
        for part in torch.split(values.view(-1, size[-1]), 1 << 14):
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        return values.to(device)

    experts, hidden, inner = shape.experts + shape.shared, shape.hidden, shape.intermediate
    columns = shape.gate_up_columns
    weights = {
        "gate": normal(shape.experts, hidden, scale=hidden**-0.5),
        "gate_up": normal(experts, columns, hidden, scale=hidden**-0.5),
        "down": normal(experts, hidden, inner, scale=inner**-0.5),
    }
    if shape.has_router_bias:
        weights["router_bias"] = normal(shape.experts, scale=0.1)
    if shape.router.selection_bias:
        weights["correction_bias"] = normal(shape.experts, scale=0.1).float()
    if shape.has_expert_bias:
        weights["gate_up_bias"] = normal(experts, columns, scale=0.1)
        weights["down_bias"] = normal(experts, hidden, scale=0.1)
    return weights


class Done(NamedTuple):
    """What one call made: ids [tokens, top_k + shared], their weights, the output, and the launches it took."""

    ids: Tensor
    topk_weights: Tensor
    out: Tensor
    launches: int


def _forward(layer: Layer, x: Tensor) -> Done:
    import torch

    ids, topk_weights = layer.kernels.route(x, layer.weights)
    if layer.ranks is None:
        total, launches = layer.kernels.forward(x, layer.weights).float(), len(layer.kernels.launches(len(x)))
    else:
        total, launches = torch.zeros(x.shape, device=x.device), 1
    for share in layer.ranks.shares(ids) if layer.ranks else ():
        if len(share.tokens):
            rows = layer.kernels.experts(
                x[share.tokens], share.local_ids, topk_weights[share.tokens], share.weights
            )
            total.index_add_(0, share.tokens, rows.float())
            launches += len(layer.kernels.launches(len(share.tokens)))
    if layer.shared is not None:
        total += layer.shared.forward(x).float()
        launches += len(layer.shared.kernels.launches(len(x)))
    return Done(ids, topk_weights, total.to(x.dtype), launches)


def _checked(result: RunResult, layer: Layer, x: Tensor, done: Done) -> RunResult:
    """The routing is judged by its scores, the output against the reference for that very routing."""
    from moecc.runtime import reference

    shape, weights = layer.shape, layer.weights
    selection = reference.select(shape.router, reference.logits(x, weights), weights.get("correction_bias"))
    selection_error = reference.selection_error(shape, selection, done.ids)
    result = replace(result, selection_error=selection_error, tolerance=TOLERANCE[shape.dtype])
    if selection_error > SELECTION_TOLERANCE:
        return replace(result, relative_error=math.inf, max_abs_error=math.inf)
    exact = done.topk_weights.double()
    routed = exact[:, : shape.top_k]
    exact[:, : shape.top_k] = reference.nearest_weights(
        shape.router, selection, done.ids[:, : shape.top_k], routed
    )
    weight_error = float((exact - done.topk_weights).abs().max())
    expected = reference.experts(x, done.ids, exact, weights, shape.activation)
    if layer.shared is not None:
        expected += layer.shared.reference(x)
    difference = done.out.double() - expected
    return replace(
        result,
        relative_error=float(difference.norm() / expected.norm()),
        max_abs_error=float(difference.abs().max()),
        selection_error=max(selection_error, weight_error),
    )
