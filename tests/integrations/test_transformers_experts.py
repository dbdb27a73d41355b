"""The experts of transformers' modules on moecc's kernels, against float64 and grouped_mm: the whole contract."""

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

from tiny_models import EXPERTS, FAMILIES, HIDDEN, INNER, TOP_K, experts_of, relative, tiny  # noqa: E402
from transformers.integrations.moe import grouped_mm_experts_forward  # noqa: E402

from moecc.errors import InputError  # noqa: E402
from moecc.integrations import transformers as moecc_transformers  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_is_said() -> Iterator[None]:
    """A fallback warns, and a test that does not expect one fails."""
    moecc_transformers._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moecc:")
        yield


def frozen(family: str) -> Any:
    """The last layer's experts, without gradients."""
    return experts_of(tiny(family)).requires_grad_(False)


def inputs(tokens: int, *, top_k: int = TOP_K, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=1)
    return x, ids, weights.to(dtype)


def by_hand(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts in float64, one assignment at a time; differentiable."""
    up = "gate_up" if module.has_gate else "up"
    parameters = {name: p.double() for name, p in module.named_parameters()}
    tokens = []
    for token in range(len(x)):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            if expert >= module.num_experts:
                continue
            matrices = [parameters[f"{name}_proj"][expert] for name in (up, "down")]
            first, second = matrices if module.is_transposed else [matrix.T for matrix in matrices]
            bias = [parameters[f"{n}_proj_bias"][expert] if module.has_bias else 0 for n in (up, "down")]
            pre = (x[token].double() @ first + bias[0])[None]
            h = (module._apply_gate(pre) if module.has_gate else module.act_fn(pre))[0]
            total = total + weight * (h @ second + bias[1])
        tokens.append(total)
    return torch.stack(tokens)


def gradients(
    function: Any,
    module: Any,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    direction: torch.Tensor,
) -> list[torch.Tensor]:
    """The output, and the gradients of x, the routing weights and all parameters."""
    module.requires_grad_(True)
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    out = function(module, leaves[0], ids, leaves[1])
    found = torch.autograd.grad(out, (*leaves, *module.parameters()), direction.to(out.dtype))
    return [out.detach(), *found]


def assert_within_twice(
    found: list[torch.Tensor], theirs: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    for ours, other, exact in zip(found, theirs, expected, strict=True):
        assert ours.dtype == other.dtype
        assert relative(ours, exact) <= 2 * relative(other, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_at_most_twice_as_much_as_grouped_mm(family: str) -> None:
    module = experts_of(tiny(family)).to(torch.bfloat16)
    x, ids, weights = inputs(30, dtype=torch.bfloat16)
    call = (module, x, ids, weights, torch.randn(30, HIDDEN, dtype=torch.bfloat16))
    found, theirs, expected = (
        gradients(function, *call)
        for function in (moecc_transformers.experts_forward, grouped_mm_experts_forward, by_hand)
    )
    assert_within_twice(found, theirs, expected)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fp16_errs_at_most_twice_as_much_as_grouped_mm(family: str, tokens: int) -> None:
    module = frozen(family).to(torch.float16)
    x, ids, weights = inputs(tokens, dtype=torch.float16, seed=tokens)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    theirs = grouped_mm_experts_forward(module, x, ids, weights)
    assert_within_twice([found], [theirs], [by_hand(module, x, ids, weights)])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_ids_of_other_devices_add_nothing(family: str) -> None:
    module = frozen(family)
    module._is_expert_parallel = True
    x, ids, weights = inputs(23)
    ids = torch.where(torch.rand(ids.shape) < 0.6, EXPERTS, ids)
    ids[4] = EXPERTS
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5
    assert not found[4].any()


def test_a_token_may_choose_more_experts_than_are_here() -> None:
    module = frozen("olmoe")
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(getattr(module, name)[:2].clone(), requires_grad=False))
    module.num_experts, module._is_expert_parallel = 2, True
    x, ids, weights = inputs(9)
    ids = ids.clamp(max=2)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


def test_no_tokens_give_no_rows() -> None:
    found = moecc_transformers.experts_forward(frozen("olmoe"), *inputs(0))
    assert found.shape == (0, HIDDEN)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_changed_weights_are_seen(family: str) -> None:
    module = frozen(family)
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
    module = frozen("olmoe")
    odd = torch.empty(module.down_proj.numel() + 1)[1:].view_as(module.down_proj).copy_(module.down_proj)
    strided = module.gate_up_proj.transpose(1, 2).contiguous().transpose(1, 2)
    module.down_proj = torch.nn.Parameter(odd, requires_grad=False)
    module.gate_up_proj = torch.nn.Parameter(strided, requires_grad=False)
    x, ids, weights = inputs(13)
    found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


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
    "gelu_quick": lambda gate: gate * torch.sigmoid(1.702 * gate),
    "clamped_silu": lambda gate: functional.silu(gate.clamp(max=1e4)),
    "one_channel": silu_but_for_one_channel,
}


class LearnedAct(torch.nn.Module):
    """An activation with a parameter, which gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(1.3))

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.tanh(gate * self.slope)


def assert_as_grouped_mm(module: Any, *, is_expert_parallel: bool = False) -> None:
    """fp32, forward and all gradients."""
    x, ids, weights = inputs(17)
    module._is_expert_parallel = is_expert_parallel
    if is_expert_parallel:
        ids = torch.where(torch.rand(ids.shape) < 0.4, EXPERTS, ids)
        weights = weights.masked_fill(ids == EXPERTS, 0)
    call = (module, x, ids, weights, torch.randn(17, HIDDEN))
    found = gradients(moecc_transformers.experts_forward, *call)
    for ours, theirs in zip(found, gradients(grouped_mm_experts_forward, *call), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("gate", UNKNOWN_GATES)
def test_another_gate_runs_between_the_gemms(gate: str) -> None:
    module = experts_of(tiny("mixtral"))
    module.act_fn = Act(UNKNOWN_GATES[gate])
    assert_as_grouped_mm(module)


@pytest.mark.parametrize("is_expert_parallel", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_an_activation_with_parameters_learns(family: str, is_expert_parallel: bool) -> None:
    module = experts_of(tiny(family))
    module.act_fn = LearnedAct()
    x, ids, weights = inputs(17)
    if is_expert_parallel:
        ids = torch.where(torch.rand(ids.shape) < 0.4, EXPERTS, ids)
    module._is_expert_parallel = is_expert_parallel
    call = (module, x, ids, weights, torch.randn(17, HIDDEN))
    found, expected = (gradients(f, *call) for f in (moecc_transformers.experts_forward, by_hand))
    for ours, exact in zip(found, expected, strict=True):
        assert relative(ours, exact) < 1e-5


@pytest.mark.parametrize("is_expert_parallel", [False, True])
def test_a_norm_behind_every_expert(is_expert_parallel: bool) -> None:
    from transformers import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    config = MuseSparkTextConfig(
        num_local_experts=EXPERTS, moe_hidden_size=HIDDEN, moe_intermediate_size=INNER, hidden_act="silu"
    )
    module = MuseSparkExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert_as_grouped_mm(module, is_expert_parallel=is_expert_parallel)


def test_weights_of_two_types_fall_back_and_say_so_once() -> None:
    module = frozen("mixtral")
    module.down_proj = torch.nn.Parameter(module.down_proj.bfloat16(), requires_grad=False)
    x, ids, weights = inputs(7)
    with pytest.warns(
        UserWarning, match="MixtralExperts: the first weights are .*; grouped_mm computes instead"
    ):
        found = moecc_transformers.experts_forward(module, x, ids, weights)
    assert relative(found, by_hand(module, x, ids, weights)) < 2e-2
    moecc_transformers.experts_forward(module, x, ids, weights)  # a second warning would be an error


def test_fp8_experts_are_refused() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    module = frozen("mixtral")
    with pytest.raises(
        InputError, match="MixtralExperts: the kernels have no FP8 experts; hint: use experts_"
    ):
        ALL_FP8_EXPERTS_FUNCTIONS["moecc"](module, *inputs(3))


@pytest.mark.parametrize("implementation", ["moecc", "moecc_recompute"])
def test_training_follows_eager(implementation: str) -> None:
    """Losses of a few optimizer steps, whose writes to the weights every step has to see."""
    losses = {}
    for name in ("eager", implementation):
        model = tiny("qwen3_moe").train()
        model.set_experts_implementation(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        batch = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
        losses[name] = []
        for _ in range(6):
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["eager"][-1] < losses["eager"][0] - 0.5
    assert losses[implementation] == pytest.approx(losses["eager"], rel=1e-4)


def test_inference_mode() -> None:
    with torch.inference_mode():
        module = frozen("gpt_oss")
        x, ids, weights = inputs(7)
        found = moecc_transformers.experts_forward(module, x, ids, weights)
        assert relative(found, by_hand(module, x, ids, weights)) < 1e-5


def test_moecc_alone_loads_no_transformers() -> None:
    code = "import sys, moecc, moecc.integrations; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
