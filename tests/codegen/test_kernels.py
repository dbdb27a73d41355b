"""The kernels' numbers against a float64 reference that shares no code with them."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from moecc.autotune.defaults import default_configs
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.ir.semantics import Activation, ActivationKind, Router

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

# Sizes are small and ragged, structure is each family's own.
FAMILIES = {
    "mixtral": LayerShape(
        tokens=17, hidden=72, intermediate=40, experts=8, top_k=2, router=Router(normalize=True)
    ),
    "qwen3": LayerShape(
        tokens=17, hidden=48, intermediate=24, experts=128, top_k=8, router=Router(normalize=True)
    ),
    "olmoe": LayerShape(tokens=17, hidden=64, intermediate=32, experts=64, top_k=8),
    "deepseek-v2": LayerShape(
        tokens=17,
        hidden=48,
        intermediate=24,
        experts=60,
        top_k=4,
        shared=2,
        router=Router(groups=5, top_groups=2, scale=16.0),
        activation=Activation(kind="gelu_glu"),
    ),
    "deepseek-v3": LayerShape(
        tokens=17,
        hidden=80,
        intermediate=48,
        experts=64,
        top_k=6,
        shared=1,
        router=Router(
            score="sigmoid",
            selection_bias=True,
            groups=8,
            top_groups=4,
            group_score="top2_sum",
            normalize=True,
            norm_eps=1e-20,
            scale=2.5,
        ),
    ),
    "gpt-oss": LayerShape(
        tokens=17,
        hidden=96,
        intermediate=96,
        experts=32,
        top_k=4,
        router=Router(select_first=True),
        activation=Activation(kind="clamped_swiglu"),
        has_router_bias=True,
        has_expert_bias=True,
    ),
    "ernie": LayerShape(
        tokens=17,
        hidden=48,
        intermediate=24,
        experts=48,
        top_k=3,
        router=Router(selection_bias=True, normalize=True, norm_min=0.4),
    ),
    "minimax-m2": LayerShape(
        tokens=17,
        hidden=48,
        intermediate=24,
        experts=96,
        top_k=8,
        router=Router(score="sigmoid", selection_bias=True, normalize=True),
    ),
    "phimoe": LayerShape(
        tokens=17,
        hidden=56,
        intermediate=24,
        experts=12,
        top_k=2,
        router=Router(score="sparsemixer", jitter=0.3),
    ),
    # The gate of Qwen2-MoE's shared expert is a router of one expert.
    "shared-gate": LayerShape(
        tokens=17, hidden=48, intermediate=72, experts=1, top_k=1, router=Router(score="sigmoid")
    ),
}
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN or the largest integer: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator():
    seed = random.randrange(1 << 31)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def make_inputs(
    shape: LayerShape, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    dtype = getattr(torch, shape.dtype)
    total, hidden, inner = shape.experts + shape.shared, shape.hidden, shape.intermediate

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    weights = {
        "gate": normal(shape.experts, hidden, scale=2 / math.sqrt(hidden)),
        "gate_up": normal(total, shape.gate_up_columns, hidden, scale=2 / math.sqrt(hidden)),
        "down": normal(total, hidden, inner, scale=1 / math.sqrt(inner)),
        "router_bias": normal(shape.experts),
        "correction_bias": torch.randn(shape.experts, generator=generator) * 0.2,
        "gate_up_bias": normal(total, shape.gate_up_columns),
        "down_bias": normal(total, hidden),
    }
    if shape.transposed:
        weights |= {name: weights[name].mT.contiguous() for name in ("gate_up", "down")}
    x = normal(shape.tokens, hidden)
    return x.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in weights.items()}


def launcher(shape: LayerShape, **changes: object) -> Launcher:
    """With a GPU present its own target is used, else this CPU natively; TRITON_INTERPRET=1 interprets."""
    host = "interpret" if INTERPRETED else "x86"
    target = host if DEVICE == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())
    configs: KernelConfigs = default_configs(shape, target)
    for kernel, fields in changes.items():
        configs = replace(configs, **{kernel: replace(getattr(configs, kernel), **fields)})
    return Launcher(freeze_layer(shape), {target: freeze_configs(configs)})


def reference_route(
    shape: LayerShape, x: torch.Tensor, weights: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and float64 weights [tokens, top_k], one token at a time and in plain Python."""
    router, size = shape.router, shape.experts // shape.router.groups
    logits = x.cpu().double() @ weights["gate"].cpu().double().T
    if shape.has_router_bias:
        logits += weights["router_bias"].cpu().double()
    all_ids, all_weights = [], []
    for row in logits:
        if router.score == "sparsemixer":
            ids, chosen = _mixed(router.jitter, row.tolist(), shape.top_k)
            all_ids.append(ids)
            all_weights.append(torch.tensor(chosen, dtype=torch.float64) * router.scale)
            continue
        scores = row if router.select_first else _score(router, row)
        selection = scores + weights["correction_bias"].cpu().double() if router.selection_bias else scores
        allowed = list(range(shape.experts))
        if router.groups > 1:
            strength = []
            for group in range(router.groups):
                best = sorted(selection[group * size : (group + 1) * size].tolist(), reverse=True)
                strength.append(best[0] if router.group_score == "max" else best[0] + best[1])
            kept = sorted(range(router.groups), key=lambda g: (-strength[g], g))[: router.top_groups]
            allowed = [e for e in allowed if e // size in kept]
        ids = sorted(allowed, key=lambda e: (-selection[e].item(), e))[: shape.top_k]
        chosen = scores[ids]
        if router.select_first:
            chosen = _score(router, chosen)
        elif router.normalize:
            chosen = chosen / max(chosen.sum().item() + router.norm_eps, router.norm_min)
        all_ids.append(ids)
        all_weights.append(chosen * router.scale)
    return torch.tensor(all_ids), torch.stack(all_weights)


def _mixed(jitter: float, row: list[float], top_k: int) -> tuple[list[int], list[float]]:
    """Sparsemixer in evaluation: each taken logit is weighed against the near ones that are left."""
    ids: list[int] = []
    weights = []
    for _ in range(top_k):
        left = [e for e in range(len(row)) if e not in ids]
        taken = max(left, key=lambda e: row[e])
        best = row[taken]
        near = [row[e] for e in left if (best - row[e]) / max(abs(row[e]), best) <= 2 * jitter]
        ids.append(taken)
        weights.append(1 / sum(math.exp(logit - best) for logit in near))
    return ids, weights


def _score(router: Router, row: torch.Tensor) -> torch.Tensor:
    return torch.softmax(row, 0) if router.score == "softmax" else 1 / (1 + torch.exp(-row))


def reference_experts(
    shape: LayerShape,
    x: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: dict[str, torch.Tensor],
) -> torch.Tensor:
    """float64 [tokens, hidden]; ids outside the experts add nothing."""
    w = {name: tensor.cpu().double() for name, tensor in weights.items()}
    if shape.transposed:
        w |= {name: w[name].mT for name in ("gate_up", "down")}
    out = torch.zeros(len(x), shape.hidden, dtype=torch.float64)
    for t, row in enumerate(x.cpu().double()):
        for expert, weight in zip(ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            if not 0 <= expert < len(w["gate_up"]):
                continue
            gate_up = w["gate_up"][expert] @ row
            if shape.has_expert_bias:
                gate_up = gate_up + w["gate_up_bias"][expert]
            down = w["down"][expert] @ _activate(shape, gate_up)
            if shape.has_expert_bias:
                down = down + w["down_bias"][expert]
            out[t] += weight * down
    return out


def _activate(shape: LayerShape, pre: torch.Tensor) -> torch.Tensor:
    """The activation of one row, from the formulas of `Activation`."""
    activation = shape.activation
    if not activation.gated:
        return _squash(activation, pre)
    gate, up = pre.view(-1, 2).T if shape.interleaved else pre.view(2, -1)
    if activation.kind == "clamped_swiglu":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate / (1 + torch.exp(-activation.alpha * gate))
    return _squash(activation, gate) * up


def _squash(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    functions = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
    }
    return functions[activation.function]


def with_shared(
    shape: LayerShape, ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shared = torch.arange(shape.experts, shape.experts + shape.shared).expand(len(ids), -1)
    return torch.cat([ids, shared], 1), torch.cat([topk_weights, torch.ones(len(ids), shape.shared)], 1)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    error = (out.cpu().double() - expected).abs().max().item()
    limit = TOLERANCE[dtype] * expected.abs().max().item()
    assert error <= limit, f"error {error:g} above {limit:g}"


def check_layer(shape: LayerShape, generator: torch.Generator, **changes: object) -> None:
    x, weights = make_inputs(shape, generator)
    layer = launcher(shape, **changes)
    ids, topk_weights = layer.route(x, weights)
    want_ids, want_weights = with_shared(shape, *reference_route(shape, x, weights))
    assert torch.equal(ids.cpu().long(), want_ids)
    assert_close(topk_weights, want_weights, "float32")

    residual = torch.randn(x.shape, generator=generator).to(x)
    out = layer.forward(x, weights, residual=residual)
    expected = reference_experts(shape, x, want_ids, want_weights, weights) + residual.cpu().double()
    assert out.dtype == x.dtype
    assert_close(out, expected, shape.dtype)
    assert torch.equal(out, layer.forward(x, weights, residual=residual)), "two runs differ"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 17])
def test_families(family, tokens, generator):
    check_layer(replace(FAMILIES[family], tokens=tokens, dtype="float32"), generator)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_16_bit_types(family, dtype, generator):
    check_layer(replace(FAMILIES[family], tokens=33, dtype=dtype), generator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", get_args(ActivationKind))
def test_activations(kind, dtype, generator):
    shape = replace(FAMILIES["mixtral"], activation=Activation(kind=kind), has_expert_bias=True)
    check_layer(replace(shape, tokens=random.randrange(1, 40), dtype=dtype), generator)


@pytest.mark.parametrize("kind", ["relu", "relu2", "clamped_swiglu"])
def test_activations_keep_nan(kind, generator):
    shape = replace(FAMILIES["mixtral"], activation=Activation(kind=kind), dtype="float32")
    x, weights = make_inputs(shape, generator)
    x[3] = torch.nan
    ids = torch.arange(34, device=DEVICE).view(17, 2) % 8
    out = launcher(shape).experts(x, ids, torch.ones(17, 2, device=DEVICE), weights)
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()


LAYOUTS = {
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True},
    "transposed and interleaved": {"transposed": True, "interleaved": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, generator):
    """Ragged, in one block and in several with masked tails."""
    shape = replace(FAMILIES["gpt-oss"], hidden=72, intermediate=40, dtype=dtype, **LAYOUTS[layout])
    check_layer(shape, generator)
    tile = {"block_m": 16, "block_n": 32, "block_k": 32, "group_m": 3}
    check_layer(shape, generator, gate_up=tile, down=tile)


def test_ungated_transposed(generator):
    shape = replace(FAMILIES["mixtral"], activation=Activation(kind="relu2"), dtype="float32")
    check_layer(replace(shape, transposed=True), generator)


def test_all_tokens_on_one_expert(generator):
    """Seven experts are empty, one fills several tiles."""
    shape = replace(FAMILIES["mixtral"], tokens=70, top_k=1, has_router_bias=True, dtype="float32")
    x, weights = make_inputs(shape, generator)
    weights["router_bias"] = torch.zeros(8, device=DEVICE).index_fill_(
        0, torch.tensor([5], device=DEVICE), 1e4
    )
    layer = launcher(shape, gate_up={"block_m": 16}, down={"block_m": 16})
    ids, _ = layer.route(x, weights)
    assert ids.unique().tolist() == [5]
    expected = reference_experts(shape, x, *reference_route(shape, x, weights), weights)
    assert_close(layer.forward(x, weights), expected, "float32")


def test_many_tokens_take_a_scatter_launch(generator):
    shape = replace(FAMILIES["deepseek-v3"], tokens=1030, hidden=16, intermediate=16, dtype="float32")
    layer = launcher(shape)
    assert layer.launches(1024, next(iter(layer.configs))) == ("router", "gate_up", "down", "combine")
    assert layer.launches(1030, next(iter(layer.configs))) == (
        "router",
        "scatter",
        "gate_up",
        "down",
        "combine",
    )
    check_layer(shape, generator)


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_router_split_over_hidden(family, generator):
    """Several programs share a token block; the last one to arrive adds their parts."""
    shape = replace(FAMILIES[family], tokens=37, hidden=144, dtype="float32")
    check_layer(shape, generator, router={"block_t": 16, "block_h": 32, "split_h": 2})


def test_small_tiles_and_masked_tails(generator):
    """No block divides its dimension, every expert has several tiles, columns and rows are grouped."""
    shape = replace(
        FAMILIES["gpt-oss"], tokens=70, hidden=72, intermediate=40, experts=4, top_k=2, dtype="float32"
    )
    tile = {"block_m": 16, "block_n": 32, "block_k": 32, "group_m": 3}
    check_layer(shape, generator, gate_up=tile, down=tile, router={"block_t": 16, "block_h": 32})


def test_fused_and_separate_combine_agree(generator):
    shape = replace(FAMILIES["deepseek-v3"], tokens=21)
    x, weights = make_inputs(shape, generator)
    fused = launcher(shape, combine={"fused_tokens": 64}).forward(x, weights)
    assert torch.equal(fused, launcher(shape, combine={"fused_tokens": 0}).forward(x, weights))


def test_given_logits_replace_the_gate(generator):
    shape = replace(FAMILIES["qwen3"], tokens=19, dtype="float32")
    x, weights = make_inputs(shape, generator)
    layer = launcher(shape)
    logits = x @ weights["gate"].T
    ids, topk_weights = layer.route(x, {}, logits=logits)
    want_ids, want_weights = layer.route(x, weights)
    assert torch.equal(ids, want_ids)
    assert_close(topk_weights, want_weights.cpu().double(), "float32")
    assert_close(
        layer.forward(x, weights, logits=logits), layer.forward(x, weights).cpu().double(), "float32"
    )


@pytest.mark.parametrize("tokens", [20, 1030])
@pytest.mark.parametrize("fused", [0, 4096])
def test_experts_of_other_devices(tokens, fused, generator):
    """Ids of -1 and past the experts are skipped; some tokens have no expert here at all."""
    shape = replace(FAMILIES["mixtral"], tokens=tokens, hidden=16, intermediate=16, dtype="float32")
    x, weights = make_inputs(shape, generator)
    weights = {name: tensor[:5] for name, tensor in weights.items()}
    ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(tokens)]) - 6
    ids[:3] = torch.tensor([-1, 5, 99, 1 << 20])
    topk_weights = torch.rand(tokens, 4, generator=generator)
    layer = launcher(shape, combine={"fused_tokens": fused})
    residual = torch.randn(x.shape, generator=generator).to(x)
    out = layer.experts(x, ids.to(DEVICE), topk_weights.to(DEVICE), weights, residual=residual)
    expected = reference_experts(shape, x, ids, topk_weights, weights) + residual.cpu().double()
    assert_close(out, expected, "float32")


@pytest.mark.parametrize("fused", [0, 4096])
def test_no_expert_here(fused, generator):
    """A rank that received only other devices' assignments returns zeros, not what lay in memory."""
    shape = replace(FAMILIES["mixtral"], dtype="float32")
    x, weights = make_inputs(shape, generator)
    ids = torch.full((17, 2), -1, device=DEVICE)
    layer = launcher(shape, combine={"fused_tokens": fused})
    out = layer.experts(x, ids, torch.ones(17, 2, device=DEVICE), weights)
    assert torch.equal(out, torch.zeros_like(x))


def test_no_tokens():
    shape = FAMILIES["deepseek-v3"]
    x, weights = make_inputs(shape, torch.Generator().manual_seed(0))
    layer = launcher(shape)
    assert layer.forward(x[:0], weights).shape == (0, 80)
    assert [tensor.shape for tensor in layer.route(x[:0], weights)] == [(0, 7), (0, 7)]


def test_ties_fall_to_the_lower_id():
    shape = replace(FAMILIES["ernie"], tokens=5, dtype="float32")
    weights = {"correction_bias": torch.zeros(48, device=DEVICE)}
    x, logits = torch.zeros(5, 48, device=DEVICE), torch.zeros(5, 48, device=DEVICE)
    ids, topk_weights = launcher(shape).route(x, weights, logits=logits)
    assert ids.tolist() == [[0, 1, 2]] * 5
    # The sum of three weights, 3 / 48, is below norm_min = 0.4.
    assert_close(topk_weights, torch.full((5, 3), 1 / 48 / 0.4, dtype=torch.float64), "float32")


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_logits_still_give_distinct_experts():
    """A poisoned activation must not become an access outside the tensors."""
    shape = replace(FAMILIES["deepseek-v3"], tokens=3, dtype="float32")
    x, weights = make_inputs(shape, torch.Generator().manual_seed(0))
    x[1] = float("nan")
    ids, _ = launcher(shape).route(x, weights)
    assert all(len(set(row)) == 7 and set(row) <= set(range(65)) for row in ids.tolist())


def test_leading_dimensions_are_kept(generator):
    shape = replace(FAMILIES["mixtral"], tokens=6, dtype="float32")
    x, weights = make_inputs(shape, generator)
    layer = launcher(shape)
    assert torch.equal(layer.forward(x.view(2, 3, -1), weights).view(6, -1), layer.forward(x, weights))


def test_misfits_are_named(generator):
    shape = FAMILIES["gpt-oss"]
    x, weights = make_inputs(shape, generator)
    layer = launcher(shape)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[17, 96\], not bfloat16"):
        layer.forward(x.float(), weights)
    with pytest.raises(ValueError, match=r"weights lack 'down_bias' \[32, 96\]"):
        layer.forward(x, {name: tensor for name, tensor in weights.items() if name != "down_bias"})
    with pytest.raises(ValueError, match=r"gate_up is \[32, 96, 192\], not \[32, 192, 96\]"):
        layer.forward(x, {**weights, "gate_up": weights["gate_up"].mT})
    with pytest.raises(RuntimeError, match="no configs for"):
        Launcher(layer.layer, {"sm_0": next(iter(layer.configs.values()))}).forward(x, weights)
