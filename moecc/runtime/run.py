"""Runs one MoE layer of an artifact with its own kernels and, on request, checks it against the reference."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.artifact import Artifact
from moecc.errors import InputError
from moecc.runtime.layer import Done, Layer, forward, load_layer
from moecc.runtime.load import best_device

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

    layer: its index in the model. weights: where they come from.
    devices: ranks whose shares were computed, in turn, in this process. launches: of all ranks together.
    time_ms: one call on all ranks together, weights in place. configs: where the kernels' configs come from.
    """

    function: str
    layer: int
    weights: str
    tokens: int
    device: str
    backend: str
    launches: int
    devices: int
    time_ms: float
    configs: str
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


def run_artifact(
    artifact: Artifact,
    *,
    tokens: int,
    check: bool,
    seed: int = 0,
    layer: int | None = None,
    weights: Path | None = None,
) -> RunResult:
    """Runs one MoE layer, compiled for the phase that suits `tokens`, on weights of a checkpoint or drawn from `seed`.

    layer: its index in the model; the first with experts by default. weights: folder of a local Hugging Face
    checkpoint, of which only that layer is read.
    With several devices every rank's share is computed in turn in this process under the artifact's placement: it
    gets the tokens that selected its experts, replicas take turns, and the sums are added. Token chunks of the
    schedule are not run apart. Raises InputError for a bad artifact, checkpoint, layer or token count, MoeccError where
    memory does not suffice.
    """
    import torch

    for flag, value, low, high in (("--tokens", tokens, 1, MAX_TOKENS), ("--seed", seed, 0, (1 << 63) - 1)):
        if not low <= value <= high:
            raise InputError(f"{value} is out of range", where=flag, hint=f"it must be in [{low}, {high}]")
    device, backend = best_device()
    generator = torch.Generator().manual_seed(seed)
    loaded = load_layer(artifact, tokens=tokens, generator=generator, index=layer, checkpoint=weights)
    dtype = getattr(torch, loaded.shape.dtype)
    x = torch.randn(tokens, loaded.shape.hidden, generator=generator).to(dtype).to(device)
    if backend != "interpret":
        forward(loaded, x)  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    done = forward(loaded, x)
    if device == "cuda":
        torch.cuda.synchronize()
    result = RunResult(
        function=loaded.function.name,
        layer=loaded.index,
        weights=loaded.source,
        tokens=tokens,
        device=device,
        backend=backend,
        launches=done.launches,
        devices=loaded.ranks.devices if loaded.ranks else 1,
        time_ms=(time.perf_counter() - start) * 1e3,
        configs=loaded.kernels.configs,
    )
    return _checked(result, loaded, x, done) if check else result


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
