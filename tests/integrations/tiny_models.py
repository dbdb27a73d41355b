"""Tiny random models of the families of transformers, and what tests ask of their experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

EXPERTS, TOP_K, HIDDEN, INNER = 8, 3, 32, 24
VOCABULARY = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": None,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "first_k_dense_replace": 1}
LOCAL = {"num_local_experts": EXPERTS}

# name: (prefix of the classes, fields of the configuration beside the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", LOCAL),
    "mixtral_gelu": ("Mixtral", LOCAL | {"hidden_act": "gelu"}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "granitemoe": ("GraniteMoe", LOCAL),
    "deepseek_v2": ("DeepseekV2", MLA | ROUTED | {"n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", MLA | ROUTED | {"n_group": 2, "topk_group": 1}),
    "glm4_moe": ("Glm4Moe", ROUTED | {"n_group": 1, "topk_group": 1, "head_dim": 16}),
    "gpt_oss": ("GptOss", LOCAL | {"head_dim": 16}),
    "phimoe": ("Phimoe", LOCAL | {"num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": INNER,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    "minimax_m2": ("MiniMaxM2", LOCAL | {"head_dim": 16}),
    "jamba": (
        "Jamba",
        {
            "num_experts": EXPERTS,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "n_group": 1,
            "topk_group": 1,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": INNER,
        },
    ),
}

# Each stands for a form of experts or of router; the other families are marked slow.
QUICK = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
BY_COST = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def tiny(family: str) -> Any:
    """Weights large enough that experts, not the residual, make the logits."""
    prefix, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | fields))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "experts." in name or name.endswith(("gate.weight", "router.weight", "router.bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def experts_of(model: Any) -> Any:
    """The last layer's experts."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")][-1]


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())
