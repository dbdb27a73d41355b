"""Models of transformers with their experts on moecc's kernels: what they compute, and what is left to grouped_mm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.moe import grouped_mm_experts_forward

import moecc.integrations.transformers as door
from moecc.codegen.x86.features import supported_levels

pytestmark = pytest.mark.skipif(
    not (supported_levels() or torch.cuda.is_available()), reason="no device that the kernels run on"
)
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FUSED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "num_key_value_heads": 4,
        **LATENT,
    },
}


@pytest.fixture(autouse=True)
def _said_nothing() -> Iterator[None]:
    torch.manual_seed(0)
    door._say_once.cache_clear()
    with torch.no_grad():
        yield


def model_of(family: str, **fields: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "_apply_gate"))


@pytest.mark.parametrize("family", FUSED)
def test_a_model_computes_what_eager_does(family: str) -> None:
    model, ids = model_of(family, **FUSED[family]), torch.randint(3, 96, (2, 7))
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    model.set_experts_implementation("moecc")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = model(ids).logits
    assert ((ours - eager).norm() / eager.norm()).item() < 1e-5


def in_float64(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """SiLU-gated experts, one assignment at a time."""
    gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(ids.shape[1])).tolist():
        expert = ids[token, slot]
        gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
        out[token] += weights[token, slot].double() * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("family", FUSED)
def test_experts_in_bf16_err_no_more_than_twice_as_grouped_mm(family: str) -> None:
    experts = experts_of(model_of(family, **FUSED[family])).bfloat16()
    for parameter in experts.parameters():
        parameter.normal_(std=0.2)
    x = torch.randn(37, 64).bfloat16()
    weights, ids = torch.rand(37, experts.num_experts).topk(2)
    exact = in_float64(experts, x, ids, weights)
    theirs = grouped_mm_experts_forward(experts, x, ids, weights)
    ours = door.experts_forward(experts, x, ids, weights)
    errors = [((result.double() - exact).norm() / exact.norm()).item() for result in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


def test_another_device_s_experts_add_nothing() -> None:
    experts = experts_of(model_of("mixtral", **FUSED["mixtral"]))
    x, ids = torch.randn(5, 64), torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [2, 0]])
    weights = torch.rand(5, 2)
    ours = door.experts_forward(experts, x, ids, weights)
    experts._is_expert_parallel = True
    torch.testing.assert_close(ours, grouped_mm_experts_forward(experts, x, ids, weights))
    assert not ours[1].any()


@pytest.mark.parametrize("tokens", [0, 1, 5, 130])
def test_any_number_of_tokens(tokens: int) -> None:
    experts = experts_of(model_of("olmoe", **FUSED["olmoe"]))
    x = torch.randn(tokens, 64)
    weights, ids = torch.rand(tokens, 8).topk(2)
    ours = door.experts_forward(experts, x, ids, weights)
    if tokens:
        torch.testing.assert_close(ours, grouped_mm_experts_forward(experts, x, ids, weights))
    else:
        assert ours.shape == (0, 64)


def test_generation_runs() -> None:
    model, ids = model_of("qwen3_moe", **FUSED["qwen3_moe"]), torch.randint(3, 96, (1, 5))
    model.set_experts_implementation("eager")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    eager = model.generate(ids, **options)
    model.set_experts_implementation("moecc")
    assert torch.equal(model.generate(ids, **options), eager)


def test_what_the_kernels_do_not_take_is_said_once_and_computed() -> None:
    model = model_of("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    ids = torch.randint(3, 96, (1, 5))
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    model.set_experts_implementation("moecc")
    with pytest.warns(
        UserWarning, match="GptOssExperts run as grouped_mm: no kernel for experts with biases"
    ) as said:
        ours = model(ids).logits
    assert len([warning for warning in said if "grouped_mm" in str(warning.message)]) == 1
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_training_is_left_to_grouped_mm_for_now() -> None:
    experts = experts_of(model_of("mixtral", **FUSED["mixtral"]))
    x, ids, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2)
    with torch.enable_grad(), pytest.warns(UserWarning, match="forward pass alone, under torch.no_grad"):
        door.experts_forward(experts, x, ids, weights).sum().backward()
    assert experts.gate_up_proj.grad is not None
