"""What the tensors of an MoE layer are called in checkpoints: data, a row for each family.

Names stand behind the prefix of their layer. Where transformers 5 saves other names than those of the published
checkpoints, both are listed, the published first. Sources: `conversion_mapping.py` and the models of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

PREFIXES = ("model.layers.{}.", "backbone.layers.{}.", "layers.{}.")


@dataclass(frozen=True, kw_only=True)
class Separate:
    """A linear for each matrix, weights [outputs, inputs]; `{}` is the expert. Experts without a gate name none."""

    gate: str | None
    up: str
    down: str


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Tensors of all experts: gate_up [experts, columns, hidden], the gate first, and down [experts, hidden, inner].

    transposed: the last two dimensions change places. interleaved: gate and up take turns, in the bias too.
    bias: what follows the names for the biases [experts, columns] and [experts, hidden].
    """

    gate_up: str
    down: str
    bias: str | None = None
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class FamilyNames:
    """Of several names for one thing a checkpoint has one."""

    gate: tuple[str, ...]
    experts: tuple[Separate | Stacked, ...]
    router_bias: tuple[str, ...] = ()
    correction_bias: tuple[str, ...] = ()
    shared: Separate | None = None
    shared_gate: tuple[str, ...] = ()


def _linears(
    prefix: str, gate: str | None = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Separate:
    return Separate(
        gate=gate and f"{prefix}.{gate}.weight", up=f"{prefix}.{up}.weight", down=f"{prefix}.{down}.weight"
    )


def _stacked(block: str) -> Stacked:
    return Stacked(gate_up=f"{block}.experts.gate_up_proj", down=f"{block}.experts.down_proj")


_QWEN3 = FamilyNames(gate=("mlp.gate.weight",), experts=(_linears("mlp.experts.{}"), _stacked("mlp")))
_MIXTRAL = FamilyNames(
    gate=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    experts=(_linears("block_sparse_moe.experts.{}", "w1", "w3", "w2"), _stacked("mlp")),
)
_DEEPSEEK_V2 = replace(_QWEN3, shared=_linears("mlp.shared_experts"))
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, correction_bias=("mlp.gate.e_score_correction_bias",))

NAMES: Mapping[str, FamilyNames] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": replace(
        _QWEN3, shared=_linears("mlp.shared_expert"), shared_gate=("mlp.shared_expert_gate.weight",)
    ),
    "qwen3_moe": _QWEN3,
    "olmoe": _QWEN3,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "gpt_oss": FamilyNames(
        gate=("mlp.router.weight",),
        router_bias=("mlp.router.bias",),
        experts=(replace(_stacked("mlp"), bias="_bias", transposed=True, interleaved=True),),
    ),
    "granitemoe": FamilyNames(
        gate=("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        experts=(
            Stacked(
                gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"
            ),
            _stacked("block_sparse_moe"),
        ),
    ),
    "phimoe": replace(_MIXTRAL, gate=("block_sparse_moe.gate.weight", "mlp.router.weight")),
    "ernie4_5_moe": replace(
        _DEEPSEEK_V2,
        correction_bias=(
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
        ),
    ),
    "minimax_m2": replace(
        _MIXTRAL,
        correction_bias=("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
    ),
    "jamba": FamilyNames(
        gate=("feed_forward.router.weight",),
        experts=(_linears("feed_forward.experts.{}"), _stacked("feed_forward")),
    ),
    "nemotron_h": FamilyNames(
        gate=("mixer.gate.weight",),
        correction_bias=("mixer.gate.e_score_correction_bias",),
        experts=(
            _linears("mixer.experts.{}", gate=None),
            Stacked(gate_up="mixer.experts.up_proj", down="mixer.experts.down_proj"),
        ),
        shared=_linears("mixer.shared_experts", gate=None),
    ),
}
