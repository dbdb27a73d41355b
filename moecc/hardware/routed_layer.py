"""The routed experts of one layer on one rank, in the sizes that a model's config names: latency and its error.

From the router's logits to the combined tokens: top-k, sorting, both GEMMs, activation, weighted sum. The GEMM that
makes the logits, shared experts and communication are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moecc.errors import InputError
from moecc.hardware.latency import ExpertLayer, GroupedGemm, latency_us
from moecc.hardware.spec import Cluster, DeviceSpec

Kernel = Literal["vllm", "moecc"]
DTYPES: Mapping[str, str] = {"bfloat16": "bfloat16", "float16": "float16", "fp8_block": "fp8", "fp8": "fp8"}
"""What weights and activations are multiplied in: the word of the device's peaks."""
BALANCED = "balanced"
POWER_LAW = "power_law_"
_CALIBRATED = {"bfloat16": "experts", "fp8_block": "experts_fp8"}
_UNSORTED_SAVES_US = 11.5
"""vLLM does not sort where four times the rows are no more than the experts, unless experts are split. Median of
predicted minus measured over 236 such bf16 layers on an H100 (vLLM 0.24, ai-dynamo/aiconfigurator at 095f58a5);
fp8 layers show none, as they quantise in launches of their own."""
_MOECC_LAUNCHES = 5  # router, plan, gate_up, down, combine


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """experts, intermediate: of the whole layer; tp ranks share each expert's columns, ep ranks the experts.

    routing: "balanced", or "power_law_A": the experts' shares are quantiles of a power law of exponent A.
    kernel: "vllm" is vLLM's Triton fused_moe, on a CPU the faster of its ops, which there are measurements of;
    "moecc" are moecc's own.
    Raises InputError for what no such layer has, naming the flag of the command line.
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    dtype: str = "bfloat16"
    gated: bool = True
    tp: int = 1
    ep: int = 1
    routing: str = BALANCED
    kernel: Kernel = "vllm"

    def __post_init__(self) -> None:
        for name in ("experts", "hidden", "intermediate", "top_k", "tp", "ep"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{getattr(self, name)} is not positive", where=flag, hint="use 1 or more")
        if self.top_k > self.experts:
            hint = f"use 1 to {self.experts}"
            raise InputError(f"{self.top_k} is more than {self.experts} experts", where="--top-k", hint=hint)
        for flag, parts, what in (("--tp", self.tp, "intermediate"), ("--ep", self.ep, "experts")):
            if getattr(self, what) % parts:
                message = f"{parts} does not divide {what} {getattr(self, what)}"
                raise InputError(message, where=flag, hint=f"use a divisor of the full {what}")
        self._check_words()

    def _check_words(self) -> None:
        if self.dtype not in DTYPES:
            hint = f"known: {', '.join(DTYPES)}"
            raise InputError(f"unknown dtype {self.dtype!r}", where="--dtype", hint=hint)
        if self.kernel not in get_args(Kernel):
            hint = f"known: {', '.join(get_args(Kernel))}"
            raise InputError(f"unknown kernel {self.kernel!r}", where="--kernel", hint=hint)
        if self.routing != BALANCED and self.exponent is None:
            hint = "use balanced, or power_law_1.2 for a power law of exponent 1.2"
            raise InputError(f"unknown routing {self.routing!r}", where="--routing", hint=hint)

    @property
    def exponent(self) -> float | None:
        """Of the power law, in (0, 4]; None where it is none."""
        try:
            value = float(self.routing.removeprefix(POWER_LAW)) if self.routing.startswith(POWER_LAW) else 0.0
        except ValueError:
            return None
        return value if 0.0 < value <= 4.0 else None


def layer_latency_us(layer: RoutedLayer, tokens: int, device: DeviceSpec) -> float:
    """Predicted time of one rank that sees `tokens` tokens, those of all ranks whose experts it holds."""
    if tokens < 1:
        raise InputError(f"{tokens} is not positive", where="--tokens", hint="use counts of 1 or more")
    work = _work(layer, tokens)
    if layer.kernel == "moecc":
        return _moecc_us(work, device)
    few = layer.ep == 1 and 4 * tokens * layer.top_k <= layer.experts
    unsorted = few and work.dtype != "fp8" and device.target != "x86"
    return latency_us(work, Cluster(device=device)) - (_UNSORTED_SAVES_US if unsorted else 0.0)


def held_out_error_pct(layer: RoutedLayer, device: DeviceSpec) -> float | None:
    """Median error on shapes that the fit did not see; None where nothing of this kind was measured."""
    if layer.kernel != "vllm" or layer.routing != BALANCED:
        return None
    return device.error_pct.get(_CALIBRATED.get(layer.dtype, ""))


def why_uncalibrated(layer: RoutedLayer, device: DeviceSpec) -> str | None:
    """Why there is no error, or None where there is one."""
    if held_out_error_pct(layer, device) is not None:
        return None
    if layer.kernel != "vllm":
        return "no measurement backs predictions of moecc's own kernels"
    if not device.error_pct:
        return f"{device.name} is uncalibrated: datasheet figures, efficiencies of another device"
    if layer.routing != BALANCED:
        return "the model was fitted under balanced routing only"
    return f"the model was not fitted to {layer.dtype} on {device.name}"


def _work(layer: RoutedLayer, tokens: int) -> ExpertLayer:
    rows = max(1.0, tokens * layer.top_k / layer.ep)
    active = _active_experts(layer, tokens) / layer.ep
    return ExpertLayer(
        tokens=tokens,
        rows=rows,
        experts_active=max(1.0, min(active, rows)),
        hidden=layer.hidden,
        intermediate=layer.intermediate // layer.tp,
        dtype=DTYPES[layer.dtype],
        gated=layer.gated,
        buffer_rows=tokens * layer.top_k,
    )


def _active_experts(layer: RoutedLayer, tokens: int) -> float:
    """Experts that get a row: all that rows suffice for, or where they are skewed those whose share is a row.

    The ranges of the power law are those by which ai-dynamo/aiconfigurator draws loads for its measurements.
    """
    if layer.exponent is None:
        return min(layer.experts, tokens * layer.top_k)
    rows = tokens * layer.top_k
    least, most = (1.0, max(0.8 * tokens, 2.0)) if rows > layer.experts else (0.01, 2.0)
    shares = _power_law(layer.experts, layer.exponent, least, most)
    return sum(min(1.0, rows * share) for share in shares)


def _power_law(count: int, exponent: float, least: float, most: float) -> list[float]:
    """`count` quantiles of a density x^-exponent on [least, most], as parts of their sum."""
    power = 1.0 - exponent
    places = [(index + 0.5) / count for index in range(count)]
    if abs(power) < 1e-9:
        values = [float(least * (most / least) ** place) for place in places]
    else:
        low, high = least**power, most**power
        values = [((high - low) * place + low) ** (1.0 / power) for place in places]
    total = sum(values)
    return [value / total for value in values]


def _moecc_us(work: ExpertLayer, device: DeviceSpec) -> float:
    """The activation is applied to the sums of the first GEMM, so it moves no memory of its own; the combine does.

    Rows of experts that live elsewhere are not written.
    """
    columns = (2 if work.gated else 1) * work.intermediate
    gemms = (
        GroupedGemm(rows=work.rows, experts_active=work.experts_active, n=n, k=k, dtype=work.dtype)
        for n, k in ((columns, work.hidden), (work.hidden, work.intermediate))
    )
    moved = 2 * (work.rows + work.tokens) * work.hidden
    combine_us = moved / (device.memory_bandwidth_gb_s * 1e3 * device.elementwise_efficiency)
    busy = sum(latency_us(gemm, Cluster(device=device)) for gemm in gemms)
    return _MOECC_LAUNCHES * device.dense.overhead_us + busy + combine_us
