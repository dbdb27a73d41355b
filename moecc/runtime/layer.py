"""One MoE layer of an artifact, ready to run: its kernels, its weights, and the ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moecc.artifact import Artifact
from moecc.codegen.config import LayerShape
from moecc.codegen.layers import KernelSet, kernel_set, kernel_sets
from moecc.errors import InputError, MoeccError
from moecc.ir.core import Function, Module
from moecc.ir.parser import parse_module
from moecc.ir.types import DTYPE_BYTES
from moecc.runtime.checkpoint import open_checkpoint
from moecc.runtime.load import Kernels, Weights, best_device, free_bytes, load_kernels
from moecc.runtime.ranks import Ranks
from moecc.runtime.weights import LayerWeights, read_layer

if TYPE_CHECKING:
    from torch import Tensor


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
    """What one run needs: kernels, the weights of all experts, and the ranks that hold them (none: one device).

    index: that of the layer in the model. source: where its weights come from.
    """

    function: Function
    index: int
    source: str
    shape: LayerShape
    kernels: Kernels
    weights: Weights
    shared: Shared | None
    ranks: Ranks | None


def compiled_module(artifact: Artifact) -> Module:
    """The IR behind the last pass."""
    final = max((name for name in artifact.manifest["files"] if name.startswith("ir/")), default="")
    if not final:
        raise InputError("the artifact holds no IR", where=str(artifact.folder), hint="compile again")
    return parse_module(artifact.read(final), final)


def load_layer(
    artifact: Artifact,
    *,
    tokens: int,
    generator: Any,
    index: int | None = None,
    checkpoint: Path | None = None,
) -> Layer:
    """The layer `index` of the model, the first with experts by default, with the kernels that suit `tokens`.

    checkpoint: folder of a local Hugging Face checkpoint; without one weights are drawn from `generator`.
    Raises InputError for a bad artifact, layer or checkpoint, MoeccError where memory does not suffice.
    """
    device, backend = best_device()
    module = compiled_module(artifact)
    sets = kernel_sets(module)
    index = _layer_index(module, sets, index)
    function, routed = _function_for(module, sets, tokens, index)
    apart = kernel_set(sets, function, "_shared")
    distributed = routed.entry == "distributed"
    _require_memory(artifact, [s.shape for s in (routed, apart) if s is not None], distributed, device)
    found = _weights(module, index, checkpoint, routed, apart, generator)
    weights = on_device(found.routed, device)
    shared = None
    if apart is not None and found.shared is not None:
        shared = Shared(
            kernels=load_kernels(artifact, apart, backend),
            shape=apart.shape,
            weights=on_device(found.shared, device),
            gated=apart.entry == "forward",
        )
    return Layer(
        function=function,
        index=index,
        source="random" if checkpoint is None else _origin(checkpoint, found.stored, routed.shape.dtype),
        shape=routed.shape,
        kernels=load_kernels(artifact, routed, backend),
        weights=weights,
        shared=shared,
        ranks=_ranks(module, index, weights) if distributed else None,
    )


def _layer_index(module: Module, sets: Sequence[KernelSet], index: int | None) -> int:
    """The index that is asked for, or the first there is."""
    layers = sorted({n for f in module.functions if kernel_set(sets, f) for n in f.attributes["layers"]})
    if not layers:
        where, hint = f"module @{module.name}", "compile a model with MoE layers"
        raise InputError("the artifact has no kernels", where=where, hint=hint)
    if index is not None and index not in layers:
        raise InputError(
            f"layer {index} has no experts", where="--layer", hint=f"layers with experts: {_ranges(layers)}"
        )
    return layers[0] if index is None else index


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them as in 1-3."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _function_for(
    module: Module, sets: Sequence[KernelSet], tokens: int, layer: int
) -> tuple[Function, KernelSet]:
    """The layer's function of the smallest phase that holds `tokens`, else of the largest."""
    mine = [f for f in module.functions if layer in f.attributes["layers"]]
    pairs = [(f, s) for f in mine if (s := kernel_set(sets, f)) is not None]
    sized = sorted(pairs, key=lambda pair: int(pair[0].attributes["tokens"]))
    return next((p for p in sized if p[0].attributes["tokens"] >= tokens), sized[-1])


def _weights(
    module: Module,
    index: int,
    checkpoint: Path | None,
    routed: KernelSet,
    apart: KernelSet | None,
    generator: Any,
) -> LayerWeights:
    if checkpoint is not None:
        family = str(module.attributes["family"])
        return read_layer(open_checkpoint(checkpoint), family, index, routed, apart)
    weights = random_weights(routed.shape, generator, _all_experts(routed.shape))
    shared = None if apart is None else random_weights(apart.shape, generator, apart.shape.experts)
    return LayerWeights(weights, shared, ())


def _origin(checkpoint: Path, stored: Sequence[str], dtype: str) -> str:
    """What is said of weights that were read, also that they were rounded."""
    exact = {dtype, *(("bfloat16", "float16") if dtype == "float32" else ())}
    rounded = "" if exact.issuperset(stored) else f" rounded to {dtype}"
    return f"{checkpoint}, {' and '.join(stored)}{rounded}"


def _ranks(module: Module, index: int, weights: Weights) -> Ranks:
    placement = module.attributes["placement"]
    return Ranks.of(placement, placement["layers"].index(index), weights)


def on_device(weights: Weights, device: str) -> Weights:
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _all_experts(shape: LayerShape) -> int:
    """Of all devices, and the shared ones that are fused into them."""
    return shape.experts + shape.shared


def _require_memory(artifact: Artifact, shapes: Sequence[LayerShape], distributed: bool, device: str) -> None:
    """Weights once, and once more as the copies of the ranks."""
    copies = 2 if distributed else 1
    needed = copies * sum(weight_bytes(shape, _all_experts(shape)) for shape in shapes)
    free = free_bytes(device)
    if needed > 0.9 * free:
        raise MoeccError(
            f"the layer's weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(artifact.folder),
            hint="run on a machine with more memory, or compile a smaller model",
        )


def weight_bytes(shape: LayerShape, experts: int) -> int:
    """Of so many experts of the layer."""
    columns = shape.gate_up_columns + shape.intermediate
    return experts * columns * shape.hidden * DTYPE_BYTES[shape.dtype]


def random_weights(shape: LayerShape, generator: Any, experts: int) -> Weights:
    """Weights of the router and of so many experts, normal with variance 1 / inputs; biases with deviation 0.1."""
    import torch

    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float) -> Tensor:
        values = torch.empty(size, dtype=dtype)
        for part in torch.split(values.view(-1, size[-1]), 1 << 14):
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        return values

    hidden, inner = shape.hidden, shape.intermediate
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


def forward(layer: Layer, x: Tensor) -> Done:
    """The layer on x [tokens, hidden], the shares of its ranks in turn."""
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
