"""What a user asked to compile, after reading and checking: plain frozen data without file formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moecc.errors import Location
from moecc.ir.semantics import Activation, Router
from moecc.ir.types import DTYPE_BYTES
from moecc.solvers.routing import Routing

AttentionKind = Literal["gqa", "mla"]
DType = Literal["bfloat16", "float16", "float32"]
Execution = Literal["home", "migrate"]
Objective = Literal["traffic", "load", "step"]
Balance = Literal["workload", "pooled", "worst", "cvar"]
RoutingKind = Literal["uniform", "zipf"]
Target = Literal["sm_80", "sm_90", "sm_100", "gfx942", "x86"]

Locations = Mapping[str, Location | str]

DEFAULT_CONTEXT_LENGTH = 4096
DEFAULT_DECODE_TOKENS = 128
DEFAULT_PREFILL_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class SharedExperts:
    """Experts that every token visits; `intermediate_size` is that of one.

    `gated`: the one expert's output is weighted by sigmoid(x @ gate) of each token (Qwen2-MoE).
    """

    count: int = 0
    intermediate_size: int = 0
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of every layer, or, where `layers` are named, of those.

    gqa: `kv_heads` keys and values of `head_dim` are cached per token.
    mla (DeepSeek): one latent of `kv_lora_rank` and one rotary key of `qk_rope_head_dim` are cached per token;
    `head_dim` is qk_nope_head_dim + qk_rope_head_dim. `q_lora_rank` None means a full query projection.
    Layers in `window_layers` see only the last `sliding_window` tokens.
    """

    kind: AttentionKind
    heads: int
    kv_heads: int
    head_dim: int
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    q_lora_rank: int | None = None
    sliding_window: int | None = None
    window_layers: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None

    @property
    def kv_elements(self) -> int:
        """Elements that one token adds to the KV cache of one layer."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """State-space mixers in the place of attention (Jamba, Nemotron-H): `parameters` are those of one layer.

    A sequence keeps `state_elements` of recurrent state in `state_dtype`, and the last inputs of the convolution,
    `window_elements` in the model's dtype.
    """

    layers: tuple[int, ...]
    parameters: int
    state_elements: int
    window_elements: int
    state_dtype: DType


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An MoE model: shapes, router semantics, and where each value was written.

    `moe_layers` and `dense_layers` are layer indices; a layer of neither has no feed-forward part. `attention`,
    `dense_intermediate_size` and `vocab_size` are None where nobody gave them. `router_bias` is a bias on the
    gate linear; `expert_bias` are biases on both expert GEMMs. `notes` are sentences for the report.
    `locations` is keyed by attribute, as in "top_k" or "router.groups".
    """

    name: str
    family: str
    hidden_size: int
    layers: int
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...] = ()
    experts: int
    top_k: int
    intermediate_size: int
    activation: Activation
    router: Router
    router_bias: bool = False
    expert_bias: bool = False
    shared_experts: SharedExperts = SharedExperts()
    attention: Attention | None = None
    mamba: Mamba | None = None
    dense_intermediate_size: int | None = None
    vocab_size: int | None = None
    tie_embeddings: bool = False
    dtype: DType = "bfloat16"
    notes: tuple[str, ...] = ()
    source: str
    locations: Locations = field(default_factory=dict, compare=False, repr=False)

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert of one layer: gate (if it has one), up and down, and their biases."""
        columns = self.activation.gate_up_columns(self.intermediate_size)
        elements = self.hidden_size * (columns + self.intermediate_size)
        if self.expert_bias:
            elements += columns + self.hidden_size
        return elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Which devices, and how many; the name is resolved by `moecc.hardware`."""

    device: str
    nodes: int
    devices_per_node: int

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """Either a recorded `trace`, in a file or at hand, or an assumed `routing`; `weight` is its share when workloads
    are pooled."""

    name: str
    trace: Path | Routing | None = None
    routing: RoutingKind | None = None
    alpha: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TokensPerDevice:
    """Tokens of one step on one device, by phase."""

    decode: int = DEFAULT_DECODE_TOKENS
    prefill: int = DEFAULT_PREFILL_TOKENS


@dataclass(frozen=True, kw_only=True)
class ServingSpec:
    """How the model is served; `context_length` is the tokens a decode step attends to."""

    execution: Execution = "home"
    tokens_per_device: TokensPerDevice = TokensPerDevice()
    context_length: int = DEFAULT_CONTEXT_LENGTH


@dataclass(frozen=True, kw_only=True)
class PlacementSpec:
    """What placement optimises; None as `slots_per_device` is ceil(experts / devices), as `max_imbalance` no cap."""

    objective: Objective = "traffic"
    balance: Balance = "workload"
    slots_per_device: int | None = None
    max_imbalance: float | None = None
    time_limit_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CompileSpec:
    """One `model.yaml`. `locations` is keyed by dotted path, as in "cluster.device" or "workloads.0.trace".

    digests: sha256 of what is compiled and stands in no file, by its role.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workloads: tuple[WorkloadSpec, ...]
    serving: ServingSpec = ServingSpec()
    placement: PlacementSpec = PlacementSpec()
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    source: str
    digests: Mapping[str, str] = field(default_factory=dict)
    locations: Locations = field(default_factory=dict, compare=False, repr=False)


def locate(locations: Locations, key: str, default: Location | str) -> Location | str:
    """Where `key` was written, or the nearest thing around it, or `default`."""
    while key:
        if key in locations:
            return locations[key]
        key = key.rpartition(".")[0]
    return default
