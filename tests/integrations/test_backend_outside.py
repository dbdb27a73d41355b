"""Models whose experts do not go through transformers' interface: left as they are, with a reason, never broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("these run on the CPU, where Triton would be the GPU's", allow_module_level=True)

from tiny_models import COMMON, relative, tokens_of  # noqa: E402
from torch._dynamo.backends.debugging import aot_eager  # noqa: E402

import moecc  # noqa: E402
from moecc.integrations.dynamo.backend import compile_graph  # noqa: E402

SMALL = {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def llama4() -> Any:
    config = transformers.Llama4TextConfig(**(COMMON | SMALL), intermediate_size_mlp=24, head_dim=16)
    return transformers.Llama4ForCausalLM(config)


def dbrx() -> Any:
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        max_seq_len=64,
        vocab_size=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    config.attn_config.rope_theta = 1e4  # what the model asks for and transformers 5 does not set
    return transformers.DbrxForCausalLM(config)


def jetmoe() -> Any:
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**(COMMON | SMALL), kv_channels=16))


def switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=256,
        d_model=32,
        d_kv=16,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_heads=2,
        num_experts=4,
        expert_capacity=8,
    )
    return transformers.SwitchTransformersEncoderModel(config)


@pytest.mark.parametrize(
    "make", [llama4, *(pytest.param(make, marks=pytest.mark.slow) for make in (dbrx, jetmoe, switch))]
)
def test_a_model_outside_the_interface_computes_what_eager_does(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, batch = make().eval().requires_grad_(False), tokens_of(2, 5)
    expected = model(batch)[0]
    found = torch.compile(model, backend=partial(compile_graph, inner=aot_eager))(batch)[0]
    assert relative(found, expected) < 1e-5


def test_experts_that_compute_every_token_are_said_to() -> None:
    found = moecc.explain(llama4().eval(), tokens_of(1, 5))
    assert [block.reason for block in found.blocks] == [
        "every expert computes every token, there is no routing to go by"
    ]
    assert "model.layers.0.feed_forward.experts: left to inductor" in str(found)
