"""`experts_implementation="moecc"` against `eager` and float64, on tiny random models of many families."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

transformers = pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from transformers.integrations.moe import grouped_mm_experts_forward  # noqa: E402

from moecc.integrations import transformers as moecc_transformers  # noqa: E402

EXPERTS, TOP_K, HIDDEN, INNER = 8, 3, 32, 24
COMMON = {
    "vocab_size": 256,
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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "mixtral_gelu": ("Mixtral", {"num_local_experts": EXPERTS, "hidden_act": "gelu"}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": EXPERTS}),
    "deepseek_v2": ("DeepseekV2", MLA | ROUTED | {"n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", MLA | ROUTED | {"n_group": 2, "topk_group": 1}),
    "glm4_moe": ("Glm4Moe", ROUTED | {"n_group": 1, "topk_group": 1, "head_dim": 16}),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 16}),
}


@pytest.fixture(autouse=True)
def nothing_is_said() -> Iterator[None]:
    """A fallback warns, and a test that does not expect one fails."""
    moecc_transformers._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moecc:")
        yield


def tiny(family: str) -> Any:
    """Weights large enough that experts, not the residual, make the logits."""
    prefix, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | fields))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "experts." in name or name.endswith(("gate.weight", "router.weight", "router.bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def experts_of(model: Any) -> Any:
    """The last layer's experts."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")][-1]


def inputs(tokens: int, *, top_k: int = TOP_K, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=1)
    return x, ids, weights.to(dtype)


def by_hand(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts in float64, one assignment at a time."""
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            if expert >= module.num_experts:
                continue
            matrices = [parameters[f"{name}_proj"][expert] for name in ("gate_up", "down")]
            gate_up, down = matrices if module.is_transposed else [matrix.T for matrix in matrices]
            bias = [
                parameters[f"{n}_proj_bias"][expert] if module.has_bias else 0 for n in ("gate_up", "down")
            ]
            h = module._apply_gate((x[token].double() @ gate_up + bias[0])[None])[0]
            out[token] += weight * (h @ down + bias[1])
    return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager(family: str) -> None:
    model = tiny(family)
    for batch in (torch.randint(0, 256, (2, 19)), torch.randint(0, 256, (1, 1))):
        model.set_experts_implementation("eager")
        expected = model(batch).logits
        model.set_experts_implementation("moecc")
        assert relative(model(batch).logits, expected) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_generate_gives_the_tokens_of_eager(family: str) -> None:
    model = tiny(family)
    prompt = torch.randint(0, 256, (2, 5))
    found = {}
    for name in ("eager", "moecc"):
        model.set_experts_implementation(name)
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        found[name] = model.generate(prompt, **options)
    assert found["moecc"].shape == (2, 11)
    torch.testing.assert_close(found["moecc"], found["eager"])


@pytest.mark.parametrize("tokens", [1, 16, 70])
@pytest.mark.parametrize("family", ["mixtral", "mixtral_gelu", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_grouped_mm(family: str, tokens: int, dtype: torch.dtype) -> None:
    module = experts_of(tiny(family)).to(dtype)
    x, ids, weights = inputs(tokens, dtype=dtype, seed=tokens)
    expected = by_hand(module, x, ids, weights)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert found.dtype == dtype
    theirs = relative(grouped_mm_experts_forward(module, x, ids, weights), expected)
    assert relative(found, expected) <= 2 * theirs


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_ids_of_other_devices_add_nothing(family: str) -> None:
    module = experts_of(tiny(family))
    module._is_expert_parallel = True
    x, ids, weights = inputs(23)
    ids = torch.where(torch.rand(ids.shape) < 0.6, EXPERTS, ids)
    ids[4] = EXPERTS
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5
    assert not found[4].any()


def test_a_token_may_choose_more_experts_than_are_here() -> None:
    module = experts_of(tiny("olmoe"))
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(getattr(module, name)[:2].clone(), requires_grad=False))
    module.num_experts, module._is_expert_parallel = 2, True
    x, ids, weights = inputs(9)
    ids = ids.clamp(max=2)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


def test_no_tokens_give_no_rows() -> None:
    found = moecc_transformers.experts_forward(experts_of(tiny("olmoe")), *inputs(0))
    assert found.shape == (0, HIDDEN)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_changed_weights_are_seen(family: str) -> None:
    module = experts_of(tiny(family))
    x, ids, weights = inputs(11)
    moecc_transformers.experts_forward(module, x, ids, weights)
    changes = [
        lambda: module.down_proj.mul_(2),
        lambda: module.gate_up_proj.copy_(module.gate_up_proj.flip(0)),
        lambda: module.load_state_dict({k: v + 0.1 for k, v in module.state_dict().items()}),
        lambda: setattr(module, "down_proj", torch.nn.Parameter(module.down_proj * 3, requires_grad=False)),
    ]
    for change in changes:
        change()
        found = moecc_transformers.experts_forward(module, x, ids, weights)
        assert relative(found, by_hand(module, x, ids, weights)) < 1e-5
    found = moecc_transformers.experts_forward(module.to(torch.bfloat16), x, ids, weights)
    assert found.dtype == torch.float32
    assert relative(found, by_hand(module, x, ids, weights)) < 2e-2


def test_weights_of_any_layout_in_memory() -> None:
    """Strided, and at an address that is a multiple of no more than the element's size."""
    module = experts_of(tiny("olmoe"))
    odd = torch.empty(module.down_proj.numel() + 1)[1:].view_as(module.down_proj).copy_(module.down_proj)
    strided = module.gate_up_proj.transpose(1, 2).contiguous().transpose(1, 2)
    module.down_proj = torch.nn.Parameter(odd, requires_grad=False)
    module.gate_up_proj = torch.nn.Parameter(strided, requires_grad=False)
    x, ids, weights = inputs(13)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


def test_a_copy_is_made_once() -> None:
    module = experts_of(tiny("gpt_oss"))
    first = moecc_transformers._experts(module, moecc_transformers._tensors(module))
    assert moecc_transformers._experts(module, moecc_transformers._tensors(module)) is first
    olmoe = experts_of(tiny("olmoe"))
    found = moecc_transformers._experts(olmoe, moecc_transformers._tensors(olmoe))
    assert found.weights["gate_up"].data_ptr() == olmoe.gate_up_proj.data_ptr()
    assert found.weights["down"].data_ptr() == olmoe.down_proj.data_ptr()


class Act(torch.nn.Module):
    """A function of the gate as the module that `act_fn` has to be."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = function


def silu_but_for_one_channel(gate: torch.Tensor) -> torch.Tensor:
    scale = torch.ones(gate.shape[-1])
    scale[3] = 1.001
    return functional.silu(gate) * scale


UNKNOWN_GATES = {
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "gelu_quick": lambda gate: gate * torch.sigmoid(1.702 * gate),
    "relu": torch.relu,
    "clamped_silu": lambda gate: functional.silu(gate.clamp(max=1e4)),
    "one_channel": silu_but_for_one_channel,
}


@pytest.mark.parametrize("gate", UNKNOWN_GATES)
def test_another_gate_falls_back_and_says_so_once(gate: str) -> None:
    module = experts_of(tiny("mixtral"))
    module.act_fn = Act(UNKNOWN_GATES[gate])
    x, ids, weights = inputs(7)
    with pytest.warns(UserWarning, match="MixtralExperts: their gate is neither .*; grouped_mm computes"):
        found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5
    moecc_transformers.experts_forward(module, x, ids, weights)  # a second warning would be an error


def test_experts_without_a_gate_fall_back() -> None:
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    module = NemotronHExperts(config).requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, ids, weights = inputs(7)
    with pytest.warns(UserWarning, match="they have no gate"):
        found = moecc_transformers.experts_forward(module, x, ids, weights)
    torch.testing.assert_close(found, grouped_mm_experts_forward(module, x, ids, weights))


def test_gradients_are_left_to_grouped_mm() -> None:
    module = experts_of(tiny("qwen3_moe"))
    module.down_proj.requires_grad_(True)
    x, ids, weights = inputs(7)
    with pytest.warns(UserWarning, match="gradients are asked for"):
        moecc_transformers.experts_forward(module, x, ids, weights).sum().backward()
    assert module.down_proj.grad.norm() > 0
    with torch.no_grad():
        found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


def test_inference_mode() -> None:
    with torch.inference_mode():
        natural, copied = (experts_of(tiny(family)) for family in ("olmoe", "gpt_oss"))
        x, ids, weights = inputs(7)
        found = moecc_transformers.experts_forward(natural, x, ids, weights)
        assert relative(found, by_hand(natural, x, ids, weights)) < 1e-5
        with pytest.warns(UserWarning, match="made in inference mode"):
            moecc_transformers.experts_forward(copied, x, ids, weights)


def test_compile_leaves_the_graph_around_the_experts() -> None:
    model = tiny("qwen3_moe")
    batch = torch.randint(0, 256, (1, 9))
    expected = model(batch).logits
    model.set_experts_implementation("moecc")
    found = torch.compile(model, backend="eager")(batch).logits
    assert relative(found, expected) < 1e-5


def test_moecc_alone_loads_no_transformers() -> None:
    code = "import sys, moecc, moecc.integrations; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
