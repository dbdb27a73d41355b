"""Measured beside predicted: every kernel set of an artifact on this machine, and what the latency models say.

A round reads a buffer that no cache holds and then runs the kernels, so that weights come from memory and the
bandwidth that they are compared with is measured under the load of the same moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moecc.artifact import Artifact
from moecc.codegen.config import DTYPE_BYTES, LayerShape
from moecc.codegen.layers import KernelSet, kernel_sets
from moecc.errors import InputError, MoeccError
from moecc.hardware import Cluster, DeviceSpec, ExpertLayer, latency_us, load_device
from moecc.runtime.layer import compiled_module, on_device, random_weights, weight_bytes
from moecc.runtime.load import best_device, free_bytes, load_kernels, target_of

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MEMORY_SHARE = 0.5  # of the free memory that weights may take: activations and the buffer come on top
ROUNDS = (3, 50)
# Threads of torch keep spinning for some milliseconds after a parallel loop, on the cores that the kernels need.
PAUSE_S = 0.02
SECONDS = (0.01, 600.0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call asks for at the least, where every expert is chosen alike.

    rows: token-expert pairs. experts: those that are hit. bytes: their weights, the input and the output.
    """

    rows: float
    experts: float
    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel set; times in us. `predicted_us` by name of the device; quartiles of the rounds beside the median.

    tokens: of one call; those that arrive, where they come from other devices. bandwidth_share: what the bytes in the
    measured time come to, of the bandwidth that reading memory had in the same round; the median of the rounds.
    Without a measurement `why` says why.
    """

    kernels: str
    tokens: int
    work: Work
    predicted_us: Mapping[str, float]
    measured_us: float | None = None
    lower_us: float | None = None
    upper_us: float | None = None
    bandwidth_share: float | None = None
    rounds: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """machine: the target that was measured. device: the one that was compiled for.

    read_gb_s: median over all rounds, None where nothing was measured.
    """

    machine: str
    device: str
    read_gb_s: float | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": "moecc.bench/1", **asdict(self)}


def bench_artifact(artifact: Artifact, *, seconds: float) -> Bench:
    """Every kernel set at the token count that it was compiled for, on random weights and inputs.

    seconds: for the rounds of one set, of which there are 3 to 50 whatever they take. Kernels compile before.
    Raises InputError for a bad artifact or `seconds`, MoeccError where only the interpreter would run.
    """
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        hint = f"it must be in [{SECONDS[0]:g}, {SECONDS[1]:g}]"
        raise InputError(f"{seconds:g} is out of range", where="--seconds", hint=hint)
    where, backend = best_device()
    if backend == "interpret":
        raise MoeccError("times of Triton's interpreter say nothing", hint="unset TRITON_INTERPRET")
    module = compiled_module(artifact)
    sets = kernel_sets(module)
    if not sets:
        hint = "compile a model with MoE layers"
        raise InputError("the artifact has no kernels", where=f"module @{module.name}", hint=hint)
    planned = load_device(module.attributes["cluster"]["device"])
    here = _device_here(target_of(backend), planned)
    devices = [planned, *([here] if here is not None and here is not planned else [])]
    reader = _Reader(where)
    rows = tuple(_row(artifact, kernels, devices, reader, backend, seconds) for kernels in sets)
    return Bench(
        machine=target_of(backend),
        device=planned.name,
        read_gb_s=reader.median_gb_s(),
        rows=rows,
        notes=tuple(_notes(planned, here, target_of(backend))),
    )


def _device_here(target: str, planned: DeviceSpec) -> DeviceSpec | None:
    """The description whose predictions stand beside what is measured here."""
    if planned.target == target:
        return planned
    return load_device("x86") if target == "x86" else None


def _notes(planned: DeviceSpec, here: DeviceSpec | None, target: str) -> Iterator[str]:
    if planned is not here:
        yield f"{planned.name} is not here, {target} is: its times are predicted only"
        yield planned.confidence()
    if here is None:
        yield f"no description of this machine is known: nothing is predicted for {target}"
        return
    if target == "x86":
        yield f"predictions for {here.name} are those of another machine: {here.description}"
    else:
        yield f"the GPU here is taken for the {here.name} that was compiled for: both are {target}"
    yield here.confidence()


def _row(
    artifact: Artifact,
    kernels: KernelSet,
    devices: Sequence[DeviceSpec],
    reader: _Reader,
    backend: str,
    seconds: float,
) -> Row:
    work = work_of(kernels.shape)
    predicted = {device.name: _predicted_us(kernels.shape, work, device) for device in devices}
    row = Row(kernels=kernels.name, tokens=kernels.shape.expert_tokens, work=work, predicted_us=predicted)
    needed, free = weight_bytes(kernels.shape, kernels.shape.held_experts), free_bytes(reader.device)
    if needed > MEMORY_SHARE * free:
        return replace(row, why=f"the weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    call = _call(artifact, kernels, reader.device, backend)
    rounds = _rounds(call, reader, seconds)
    times = [time_us for time_us, _ in rounds]
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    share = statistics.median(work.bytes / time_us / 1e3 / read_gb_s for time_us, read_gb_s in rounds)
    return replace(
        row,
        measured_us=median,
        lower_us=lower,
        upper_us=upper,
        bandwidth_share=share,
        rounds=len(rounds),
    )


def work_of(shape: LayerShape) -> Work:
    """Of one call on one device: its own tokens' worth of rows, wherever the tokens come from."""
    routed = shape.tokens * shape.top_k
    held, hidden = shape.slots or shape.experts, shape.hidden
    hit = held * (1 - (1 - 1 / held) ** routed)
    rows, experts = routed + shape.shared * shape.expert_tokens, hit + shape.shared
    expert = hidden * (shape.gate_up_columns + shape.intermediate)
    elements = experts * expert + 2 * shape.expert_tokens * hidden
    return Work(
        rows=rows, experts=experts, flops=2.0 * rows * expert, bytes=elements * DTYPE_BYTES[shape.dtype]
    )


def _predicted_us(shape: LayerShape, work: Work, device: DeviceSpec) -> float:
    layer = ExpertLayer(
        tokens=shape.expert_tokens,
        rows=work.rows,
        experts_active=work.experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        dtype=shape.dtype,
        gated=shape.activation.gated,
    )
    return latency_us(layer, Cluster(device=device))


def _call(artifact: Artifact, kernels: KernelSet, device: str, backend: str) -> Callable[[], object]:
    """The set on random weights: the whole layer on one device, else the experts under a uniform routing."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape, loaded = kernels.shape, load_kernels(artifact, kernels, backend)
    weights = on_device(random_weights(shape, generator, shape.held_experts), device)
    x = torch.randn(shape.expert_tokens, shape.hidden, generator=generator)
    x = x.to(getattr(torch, shape.dtype)).to(device)
    if kernels.entry == "forward":
        return lambda: loaded.forward(x, weights)
    ids = _uniform_ids(shape, generator).to(device)
    topk_weights = torch.full(ids.shape, 1 / shape.top_k, device=device)
    return lambda: loaded.experts(x, ids, topk_weights, weights)


def _uniform_ids(shape: LayerShape, generator: Any) -> Tensor:
    """Ids int32 [tokens that arrive, top_k] of the device's experts: as many as its own tokens ask for; others -1."""
    import torch

    tokens, held = shape.expert_tokens, shape.slots or shape.experts
    chosen = torch.rand(tokens, held, generator=generator).argsort(-1)[:, : shape.top_k].int()
    asked = torch.rand(chosen.numel(), generator=generator).argsort() < shape.tokens * shape.top_k
    return torch.where(asked.view_as(chosen), chosen, -1)


def _rounds(call: Callable[[], object], reader: _Reader, seconds: float) -> list[tuple[float, float]]:
    """Of every round the call's time in us, and the bandwidth in GB/s right before it."""
    call()  # compiles
    count = int(seconds * 1e6 / reader.timed_us(call))
    rounds = []
    for _ in range(min(max(count, ROUNDS[0]), ROUNDS[1])):
        read_gb_s = reader.read()
        time.sleep(PAUSE_S)
        rounds.append((reader.timed_us(call), read_gb_s))
    return rounds


class _Reader:
    """Reads a large buffer again and again, and remembers how fast; of torch's reductions the norm reads fastest."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        self._buffer = torch.ones(READ_BYTES[device] // 4, device=device)
        self._gb_s: list[float] = []

    def read(self) -> float:
        self._gb_s.append(READ_BYTES[self.device] / self.timed_us(self._buffer.norm) / 1e3)
        return self._gb_s[-1]

    def timed_us(self, call: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        call()
        self._wait()
        return (time.perf_counter() - began) * 1e6

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def median_gb_s(self) -> float | None:
        return statistics.median(self._gb_s) if self._gb_s else None
