"""A layer as IR: what the passes leave, and what is read back from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from moecc.codegen.config import LayerShape
from moecc.errors import InputError, MoeccError
from moecc.integrations import block_ir
from moecc.integrations.block_ir import fused_text, lowered_shape
from moecc.ir.semantics import Activation, Router
from moecc.passes.normalize import Normalize

ROUTERS = (
    Router(),
    Router(normalize=True, norm_min=1e-12, selection_bias=True),
    Router(
        score="sigmoid",
        groups=4,
        top_groups=2,
        group_score="top2_sum",
        norm_eps=1e-20,
        normalize=True,
        scale=2.5,
    ),
    Router(score="sparsemixer", jitter=0.01),
)
ACTIVATIONS = (
    Activation(),
    Activation(kind="clamped_swiglu", alpha=1.5, limit=3.0),
    Activation(kind="relu2"),
)


@st.composite
def shapes(draw: st.DrawFn) -> LayerShape:
    activation = draw(st.sampled_from(ACTIVATIONS))
    return LayerShape(
        tokens=draw(st.integers(1, 4096)),
        hidden=draw(st.integers(1, 4096)),
        intermediate=draw(st.integers(1, 2048)),
        experts=4 * draw(st.integers(2, 64)),
        top_k=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(("bfloat16", "float16", "float32"))),
        router=draw(st.sampled_from(ROUTERS)),
        activation=activation,
        has_router_bias=draw(st.booleans()),
        has_expert_bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        interleaved=activation.gated and draw(st.booleans()),
    )


@settings(max_examples=50)
@given(shapes(), st.integers(1, 4096))
def test_the_text_holds_all_of_a_layer(shape: LayerShape, tokens: int) -> None:
    text = fused_text(shape)
    assert lowered_shape(text, tokens) == replace(shape, tokens=tokens)
    assert fused_text(replace(shape, tokens=1)) == text


def test_one_kernel_routes_and_sorts_one_gathers_one_combines() -> None:
    lines = fused_text(LayerShape(tokens=1, hidden=8, intermediate=4, experts=4, top_k=2)).splitlines()
    assert [line.split(" = ")[1].split("(")[0] for line in lines if " = moe." in line] == [
        "moe.router",
        "moe.gate_up",
        "moe.down_combine",
    ]
    assert any("moe.router" in line and "sort = true" in line for line in lines)


def test_what_is_not_fused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_ir, "PASSES", (Normalize(),))
    with pytest.raises(
        MoeccError, match="not fused: moe.gate; moe.route; moe.dispatch; moe.experts; moe.combine"
    ):
        fused_text(LayerShape(tokens=1, hidden=8, intermediate=4, experts=4, top_k=2))


def test_a_text_that_is_none_is_located() -> None:
    with pytest.raises(InputError, match=r"moecc::moe_block:1:1"):
        lowered_shape("nothing", 1)
