"""Gradients of the experts against autograd on the float64 reference, which shares no code with the kernels."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import pytest
import torch

from moecc.autotune.training_defaults import training_configs
from moecc.codegen.config import LayerShape
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.training import WANTED, TrainingLauncher
from moecc.ir.semantics import Activation, ActivationKind
from moecc.runtime import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SHAPE = LayerShape(tokens=19, hidden=72, intermediate=40, experts=8, top_k=3, dtype="float32")
BIASED = replace(SHAPE, has_expert_bias=True)
# Relative to the largest element. Errors of 16 bits: h and the gradient of pre are rounded on their way.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
LAYOUTS = {
    "natural": {},
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True},
    "both": {"transposed": True, "interleaved": True},
}
Tensors = dict[str, torch.Tensor]


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


def launcher(shape: LayerShape, **changes: Mapping[str, int]) -> TrainingLauncher:
    host = "interpret" if INTERPRETED else "x86"
    target = host if DEVICE == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())
    configs = training_configs(shape, target)
    backward = {name: replace(configs.by_kernel[name], **fields) for name, fields in changes.items()}
    forward = {name: backward.pop(name) for name in ("gate_up", "down") if name in backward}
    configs = replace(configs, **forward, backward=replace(configs.backward, **backward))
    return TrainingLauncher(freeze_layer(shape), {target: freeze_configs(configs)})


def make_inputs(shape: LayerShape, generator: torch.Generator) -> Tensors:
    """x, topk_ids, topk_weights, grad_out and the weights of all experts."""
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    hidden, inner, columns = shape.hidden, shape.intermediate, shape.gate_up_columns
    weights = {
        "gate_up": normal(shape.experts, columns, hidden, scale=2 * hidden**-0.5),
        "down": normal(shape.experts, hidden, inner, scale=inner**-0.5),
    }
    if shape.transposed:
        weights = {name: tensor.mT.contiguous() for name, tensor in weights.items()}
    if shape.has_expert_bias:
        weights["gate_up_bias"] = normal(shape.experts, columns)
        weights["down_bias"] = normal(shape.experts, hidden)
    scores = torch.rand(shape.tokens, shape.experts, generator=generator)
    inputs = {
        "x": normal(shape.tokens, hidden),
        "topk_ids": scores.topk(shape.top_k, dim=1).indices,
        "topk_weights": torch.rand(shape.tokens, shape.top_k, generator=generator),
        "grad_out": normal(shape.tokens, hidden),
        **weights,
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def split(inputs: Tensors) -> tuple[Tensors, Tensors]:
    """What is not a weight, and the weights."""
    weights = {name: tensor for name, tensor in inputs.items() if name.startswith(("gate_up", "down"))}
    return {name: tensor for name, tensor in inputs.items() if name not in weights}, weights


def reference_gradients(shape: LayerShape, inputs: Tensors) -> Tensors:
    leaves = {
        name: tensor.cpu().double().requires_grad_() for name, tensor in inputs.items() if name in WANTED
    }
    out = reference.experts(
        leaves["x"],
        inputs["topk_ids"].cpu(),
        leaves["topk_weights"],
        split(leaves)[1],
        shape.activation,
        transposed=shape.transposed,
        interleaved=shape.interleaved,
    )
    out.backward(inputs["grad_out"].cpu().double())
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def gradients(
    layer: TrainingLauncher, inputs: Tensors, pre: torch.Tensor | None, *names: str
) -> dict[str, torch.Tensor]:
    wanted = frozenset(names) if names else WANTED & inputs.keys()
    arguments, weights = split(inputs)
    grad_out = arguments.pop("grad_out")
    return layer.experts_backward(grad_out, *arguments.values(), weights, pre, wanted=wanted)


def assert_close(found: Tensors, expected: Tensors, inputs: Tensors, dtype: str) -> None:
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype, name
        assert gradient.shape == inputs[name].shape, name
        error = (gradient.cpu().double() - expected[name]).abs().max().item()
        limit = TOLERANCE[dtype] * expected[name].abs().max().item()
        assert error <= limit, f"{name}: error {error:g} above {limit:g}"


def check(shape: LayerShape, inputs: Tensors, **changes: Mapping[str, int]) -> None:
    """Every gradient, with what the forward pass saved and without, and twice the same bits."""
    layer = launcher(shape, **changes)
    arguments, weights = split(inputs)
    out, pre = layer.experts_saving(*list(arguments.values())[:3], weights)
    assert torch.equal(out, layer.experts(*list(arguments.values())[:3], weights))
    expected = reference_gradients(shape, inputs)
    saved = gradients(layer, inputs, pre)
    assert saved.keys() == WANTED & inputs.keys()
    assert_close(saved, expected, inputs, shape.dtype)
    for name, again in gradients(layer, inputs, pre).items():
        assert torch.equal(again, saved[name]), f"two runs differ in {name}"
    for name, recomputed in gradients(layer, inputs, None).items():
        assert torch.equal(recomputed, saved[name]), f"recomputing changes {name}"


@pytest.mark.parametrize("kind", get_args(ActivationKind))
def test_activations(kind, generator):
    shape = replace(BIASED, activation=Activation(kind=kind, limit=1.0))
    check(shape, make_inputs(shape, generator))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, generator):
    shape = replace(BIASED, dtype=dtype, **LAYOUTS[layout])
    check(shape, make_inputs(shape, generator))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_tiles_and_masked_tails(layout, generator):
    """No block divides its dimension, every expert has several tiles and takes several steps of rows."""
    shape = replace(BIASED, tokens=75, experts=4, top_k=2, **LAYOUTS[layout])
    tile = {"block_m": 16, "block_n": 32, "block_k": 32, "group_m": 3}
    outer = {"block_m": 16, "block_n": 32, "block_k": 16, "group_m": 2}
    names = {"gate_up": tile, "down": tile, "grad_pre": tile, "grad_x": tile}
    sums = {"block_r": 4, "block_n": 16}
    check(
        shape,
        make_inputs(shape, generator),
        **names,
        grad_gate_up=outer,
        grad_down=outer,
        grad_bias=sums,
    )


@pytest.mark.parametrize("tokens", [1, 1030])
def test_few_and_many_tokens(tokens, generator):
    shape = replace(SHAPE, tokens=tokens, hidden=32, intermediate=16)
    check(shape, make_inputs(shape, generator))


def test_all_tokens_on_one_expert(generator):
    """The others have no rows: their weights get zeros, not what lay in memory."""
    shape = replace(BIASED, tokens=70, top_k=1)
    inputs = make_inputs(shape, generator)
    inputs["topk_ids"] = torch.full_like(inputs["topk_ids"], 5)
    check(shape, inputs)


def test_ids_of_other_devices(generator):
    """They have no gradient, whatever lies in their rows; some tokens have no expert here."""
    inputs = make_inputs(BIASED, generator)
    inputs["topk_ids"] = inputs["topk_ids"] * 3 - 4
    inputs["topk_ids"][:3] = torch.tensor([-1, 8, 1 << 20])
    check(BIASED, inputs)


def test_no_expert_here(generator):
    inputs = make_inputs(BIASED, generator)
    inputs["topk_ids"] = torch.full_like(inputs["topk_ids"], -1)
    found = gradients(launcher(BIASED), inputs, None)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


def test_no_tokens(generator):
    inputs = make_inputs(BIASED, generator)
    for name in ("x", "topk_ids", "topk_weights", "grad_out"):
        inputs[name] = inputs[name][:0]
    layer = launcher(BIASED)
    arguments, weights = split(inputs)
    out, pre = layer.experts_saving(*list(arguments.values())[:3], weights)
    assert (out.shape, pre.shape) == ((0, 72), (0, 80))
    found = gradients(layer, inputs, pre)
    assert found.keys() == WANTED
    for name, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("name", sorted(WANTED))
def test_only_what_is_wanted(name, generator):
    inputs = make_inputs(BIASED, generator)
    layer = launcher(BIASED)
    everything = gradients(layer, inputs, None)
    found = gradients(layer, inputs, None, name)
    assert found.keys() == {name}
    assert torch.equal(found[name], everything[name])


def test_routing_weights_keep_their_dtype(generator):
    inputs = make_inputs(SHAPE, generator)
    inputs["topk_weights"] = inputs["topk_weights"].half()
    found = gradients(launcher(SHAPE), inputs, None, "topk_weights")
    assert found["topk_weights"].dtype == torch.float16
    expected = reference_gradients(SHAPE, inputs)
    assert_close(found, expected, inputs, "float16")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_function_of_the_caller_between_the_gemms(layout, generator):
    """project, then a graph of torch on the rows, then combine: forward and backward."""
    shape = replace(BIASED, activation=Activation(kind="gelu_tanh_glu"), **LAYOUTS[layout])
    inputs, layer = make_inputs(shape, generator), launcher(shape)
    (x, ids, topk_weights, grad_out), weights = split(inputs)[0].values(), split(inputs)[1]
    pre = layer.project(x, ids, weights).requires_grad_()
    gate, up = (pre[:, ::2], pre[:, 1::2]) if shape.interleaved else pre.chunk(2, 1)
    h = torch.nn.functional.gelu(gate, approximate="tanh") * up
    out = layer.combine(h.detach(), ids, topk_weights, weights)
    fused = layer.experts(x, ids, topk_weights, weights)
    torch.testing.assert_close(out, fused, rtol=1e-5, atol=1e-5)

    wanted = frozenset(("h", "topk_weights", "down", "down_bias"))
    found = layer.combine_backward(grad_out, h.detach(), ids, topk_weights, weights, wanted=wanted)
    h.backward(found.pop("h"))
    wanted = frozenset(("x", "gate_up", "gate_up_bias"))
    found |= layer.project_backward(pre.grad, x, ids, weights, wanted=wanted)
    assert found.keys() == WANTED
    assert_close(found, reference_gradients(shape, inputs), inputs, shape.dtype)


def test_misfits_are_named(generator):
    inputs, layer = make_inputs(SHAPE, generator), launcher(SHAPE)
    with pytest.raises(ValueError, match="no gradient of h, y: it is one of down, down_bias, gate_up"):
        gradients(layer, inputs, None, "x", "h", "y")
    with pytest.raises(ValueError, match=r"pre is \[3, 80\], not \[57, 80\]"):
        gradients(layer, inputs, torch.empty(3, 80))
    forward_only = {
        target: {name: config for name, config in configs.items() if not name.startswith("grad")}
        for target, configs in layer.configs.items()
    }
    with pytest.raises(RuntimeError, match="no configs of the backward pass for"):
        gradients(TrainingLauncher(layer.layer, forward_only), inputs, None)
