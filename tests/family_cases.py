"""Small configurations of every family, as transformers itself writes them, and its own modules of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moecc.frontend.hf_config import load_hf_config
from moecc.frontend.spec import ModelSpec

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "dtype": "bfloat16",
}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
SHARING = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
DEEPSEEK = {**LATENT, **SHARING, "n_shared_experts": 1, "num_mtp_layers": 0}
DEEPSEEK_V2 = {**LATENT, **SHARING, "routed_scaling_factor": 1.5}
GLM = {**COMMON, **SHARING, "head_dim": 16, "num_mtp_layers": 0, "routed_scaling_factor": 2.5}
QWEN = {**COMMON, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 16, "head_dim": 16}
QWEN2 = {
    **COMMON,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 16,
}
OLMOE = {**COMMON, "intermediate_size": 24, "num_experts": 16}
LOCAL = {**COMMON, "intermediate_size": 24, "num_local_experts": 16}
PHI = {**LOCAL, "num_experts_per_tok": 2, "router_jitter_noise": 0.2}
ERNIE = {
    **COMMON,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "moe_num_experts": 16,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
}
ERNIE.pop("num_experts_per_tok")
JAMBA = {**COMMON, "intermediate_size": 24, "num_experts": 16, "mamba_d_state": 6, "mamba_d_conv": 3}
NEMOTRON = {
    **COMMON,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 56,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 10,
    "conv_kernel": 3,
}
NEMOTRON.pop("num_hidden_layers")


@dataclass(frozen=True)
class Case:
    """One model: transformers' prefix of its classes, its router's class, and the configuration."""

    kind: str
    router: str
    values: dict[str, Any]

    @property
    def config(self) -> Any:
        return getattr(transformers, f"{self.kind}Config")(**self.values)

    @property
    def module(self) -> Any:
        name = self.config.model_type
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def spec(self, folder: Path) -> ModelSpec:
        """Through the file that transformers itself writes."""
        self.config.save_pretrained(folder)
        return load_hf_config(folder)

    def router_of(self) -> Any:
        return getattr(self.module, self.router)(self.config).float().eval()

    def model(self) -> Any:
        return getattr(self.module, f"{self.kind}ForCausalLM")(self.config).float().eval()


CASES: dict[str, Case] = {
    "mixtral": Case("Mixtral", "MixtralTopKRouter", {**LOCAL, "sliding_window": 7}),
    "qwen2": Case("Qwen2Moe", "Qwen2MoeTopKRouter", QWEN2),
    "qwen2-norm": Case(
        "Qwen2Moe",
        "Qwen2MoeTopKRouter",
        {**QWEN2, "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ),
    "qwen3": Case("Qwen3Moe", "Qwen3MoeTopKRouter", {**QWEN, "norm_topk_prob": True}),
    "qwen3-raw": Case(
        "Qwen3Moe", "Qwen3MoeTopKRouter", {**QWEN, "mlp_only_layers": [2], "norm_topk_prob": False}
    ),
    "qwen3-sparse": Case("Qwen3Moe", "Qwen3MoeTopKRouter", {**QWEN, "decoder_sparse_step": 2}),
    "olmoe": Case("Olmoe", "OlmoeTopKRouter", OLMOE),
    "olmoe-norm": Case(
        "Olmoe", "OlmoeTopKRouter", {**OLMOE, "norm_topk_prob": True, "tie_word_embeddings": True}
    ),
    "deepseek-v2": Case(
        "DeepseekV2",
        "DeepseekV2TopkRouter",
        {**DEEPSEEK_V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v2-lite": Case("DeepseekV2", "DeepseekV2TopkRouter", {**DEEPSEEK_V2, "q_lora_rank": None}),
    "deepseek": Case("DeepseekV3", "DeepseekV3TopkRouter", {**DEEPSEEK, "n_group": 4, "topk_group": 2}),
    "deepseek-raw": Case(
        "DeepseekV3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "n_group": 8, "topk_group": 3, "norm_topk_prob": False, "q_lora_rank": None},
    ),
    "kimi": Case(
        "DeepseekV3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    ),
    "glm4": Case("Glm4Moe", "Glm4MoeTopkRouter", GLM),
    "glm4-groups": Case(
        "Glm4Moe", "Glm4MoeTopkRouter", {**GLM, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}
    ),
    "gpt-oss": Case("GptOss", "GptOssTopKRouter", {**LOCAL, "head_dim": 16}),
    "granite": Case(
        "GraniteMoe",
        "GraniteMoeTopKRouter",
        {**LOCAL, "residual_multiplier": 0.22, "num_key_value_heads": None},
    ),
    "phi": Case("Phimoe", "PhimoeTopKRouter", PHI),
    "ernie": Case("Ernie4_5_Moe", "Ernie4_5_MoeTopKRouter", ERNIE),
    "ernie-sparse": Case(
        "Ernie4_5_Moe",
        "Ernie4_5_MoeTopKRouter",
        {
            **ERNIE,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 2,
            "moe_num_shared_experts": 0,
            "moe_norm_min": 0.5,
            "tie_word_embeddings": False,
        },
    ),
    "minimax-m2": Case("MiniMaxM2", "MiniMaxM2TopKRouter", {**LOCAL, "head_dim": 16}),
    "jamba": Case("Jamba", "JambaTopKRouter", {**JAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "jamba-sparse": Case(
        "Jamba",
        "JambaTopKRouter",
        {**JAMBA, "expert_layer_period": 3, "expert_layer_offset": 0, "mamba_dt_rank": 5, "mamba_expand": 3},
    ),
    "nemotron-h": Case("NemotronH", "NemotronHTopkRouter", {**NEMOTRON, "hybrid_override_pattern": "ME*EM-"}),
    "nemotron-h-groups": Case(
        "NemotronH",
        "NemotronHTopkRouter",
        {
            **NEMOTRON,
            "layers_block_type": ["moe", "full_attention", "moe"],
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "mlp_hidden_act": "silu",
            "moe_shared_expert_intermediate_size": 72,
        },
    ),
}
# One of each family, for checks that are slow.
FAMILIES = (
    "mixtral",
    "qwen2",
    "qwen3",
    "olmoe",
    "deepseek-v2",
    "deepseek",
    "glm4",
    "gpt-oss",
    "granite",
    "phi",
    "ernie",
    "minimax-m2",
    "jamba",
    "nemotron-h",
)


def feed_forward(layer: Any) -> Any:
    """The dense MLP or the block with experts of a decoder layer."""
    names = ("mlp", "block_sparse_moe", "feed_forward", "mixer")
    return next(block for name in names if (block := getattr(layer, name, None)) is not None)


def correction_bias(block: Any) -> torch.Tensor | None:
    """The bias that enters the selection only, of a router or a whole block: [experts]."""
    found = [
        tensor
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if name.endswith("e_score_correction_bias")
    ]
    return found[0].detach().flatten() if found else None


def fill(block: Any, generator: torch.Generator) -> None:
    """Normal numbers in every weight: modules start with zeros, or with whatever lay in memory."""
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.5
