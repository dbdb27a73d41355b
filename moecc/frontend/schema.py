"""The shape of model.yaml, for pydantic: names, types and ranges of single values; nothing that compares two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from moecc.frontend import spec
from moecc.ir.semantics import ActivationKind, GroupScore, Score

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RouterFields(_Strict):
    score: Score = "softmax"
    select_first: bool = False
    bias: Literal["none", "logits", "selection", "both"] = "none"
    groups: Size = 1
    top_groups: Size | None = None
    group_score: GroupScore = "max"
    normalize: bool = False
    norm_eps: NotNegative = 0.0
    norm_min: NotNegative = 0.0
    scale: Positive = 1.0
    jitter: NotNegative = 0.0


class ActivationFields(_Strict):
    kind: ActivationKind
    alpha: Positive = 1.702
    limit: Positive = 7.0
    gated: bool = True


class SharedExpertsFields(_Strict):
    count: Count
    intermediate_size: Size | None = None
    gated: bool = False


class AttentionFields(_Strict):
    kind: spec.AttentionKind = "gqa"
    heads: Size
    kv_heads: Size | None = None
    head_dim: Size | None = None
    kv_lora_rank: Size | None = None
    qk_rope_head_dim: Size | None = None
    qk_nope_head_dim: Size | None = None
    v_head_dim: Size | None = None
    q_lora_rank: Size | None = None
    sliding_window: Size | None = None


def _activation(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


class InlineModel(_Strict):
    name: Text = "model"
    hidden_size: Size
    moe_layers: Size
    dense_layers: list[Count] = []
    dense_intermediate_size: Size | None = None
    experts: Size
    top_k: Size
    intermediate_size: Size
    activation: Annotated[ActivationFields, BeforeValidator(_activation)] = ActivationFields(kind="silu_glu")
    router: RouterFields
    expert_bias: bool = False
    shared_experts: SharedExpertsFields = SharedExpertsFields(count=0)
    attention: AttentionFields | None = None
    vocab_size: Size | None = None
    tie_embeddings: bool = False
    dtype: spec.DType = "bfloat16"


class HfModel(_Strict):
    name: Text | None = None
    hf_config: Text


class PresetModel(_Strict):
    name: Text | None = None
    preset: Text


class ClusterFields(_Strict):
    device: Text
    nodes: Size = 1
    devices_per_node: Size


class WorkloadFields(_Strict):
    name: Text
    trace: Text | None = None
    routing: spec.RoutingKind | None = None
    alpha: Positive | None = None
    weight: Positive = 1.0


class TokensFields(_Strict):
    decode: Size = spec.DEFAULT_DECODE_TOKENS
    prefill: Size = spec.DEFAULT_PREFILL_TOKENS


class ServingFields(_Strict):
    execution: spec.Execution = "home"
    tokens_per_device: TokensFields = TokensFields()
    context_length: Size = spec.DEFAULT_CONTEXT_LENGTH


class PlacementFields(_Strict):
    objective: spec.Objective = "traffic"
    balance: spec.Balance = "workload"
    slots_per_device: Size | None = None
    memory_per_device_gb: Positive | None = None
    max_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    time_limit_s: Positive = 30.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class FileFields(_Strict):
    """What every model.yaml has beside its model."""

    moecc: Literal[1]
    cluster: ClusterFields
    workloads: list[WorkloadFields] = []
    serving: ServingFields = ServingFields()
    placement: PlacementFields = PlacementFields()
    targets: Annotated[list[spec.Target], Field(min_length=1)] | None = None


class InlineFile(FileFields):
    """A model.yaml whose model is written out."""

    model: InlineModel


class HfFile(FileFields):
    """A model.yaml whose model is a Hugging Face config.json."""

    model: HfModel


class PresetFile(FileFields):
    """A model.yaml whose model is a preset."""

    model: PresetModel
