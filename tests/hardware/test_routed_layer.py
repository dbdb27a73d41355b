"""A layer in the sizes of a model's config: how it is split, loaded and skewed, and what backs its prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.hardware import Cluster, ExpertLayer, device_names, latency_us, load_device
from moecc.hardware.routed_layer import (
    RoutedLayer,
    held_out_error_pct,
    layer_latency_us,
    why_uncalibrated,
)

H100 = load_device("h100-sxm")
LAYER = RoutedLayer(experts=128, hidden=2048, intermediate=768, top_k=8)


def test_a_rank_has_its_part_of_experts_and_columns() -> None:
    """512 tokens, 4,096 rows in all: a quarter of them on the 32 experts of one of four ranks."""
    expected = ExpertLayer(
        tokens=512,
        rows=1024,
        experts_active=32,
        hidden=2048,
        intermediate=384,
        dtype="bfloat16",
        buffer_rows=4096,
    )
    layer = replace(LAYER, tp=2, ep=4)
    assert layer_latency_us(layer, 512, H100) == latency_us(expected, Cluster(device=H100))


@given(
    tokens=st.integers(1, 1 << 17),
    more=st.integers(1, 4),
    kernel=st.sampled_from(["vllm", "moecc"]),
    routing=st.sampled_from(["balanced", "power_law_1.01", "power_law_1", "power_law_1.2"]),
    name=st.sampled_from([name for name in device_names() if name != "x86"]),
    gated=st.booleans(),
)
def test_more_tokens_never_take_less(
    tokens: int, more: int, kernel: Any, routing: str, name: str, gated: bool
) -> None:
    layer, device = replace(LAYER, kernel=kernel, routing=routing, gated=gated), load_device(name)
    one, several = (layer_latency_us(layer, count, device) for count in (tokens, tokens * more))
    assert 0 < one <= several * (1 + 1e-9)


def test_few_tokens_are_not_sorted() -> None:
    """Four tokens have 32 rows, four times that are 128: the last count that vLLM does not sort; not with fp8, not split."""
    work = ExpertLayer(
        tokens=4, rows=32, experts_active=32, hidden=2048, intermediate=768, dtype="bfloat16", buffer_rows=32
    )
    saved = latency_us(work, Cluster(device=H100)) - layer_latency_us(LAYER, 4, H100)
    assert saved == pytest.approx(11.5)
    work = replace(work, tokens=5, rows=40, experts_active=40, buffer_rows=40)
    assert layer_latency_us(LAYER, 5, H100) == latency_us(work, Cluster(device=H100))


def test_skew_leaves_experts_without_rows() -> None:
    """Weights are what takes time there, so the fewer experts are read, the less: vLLM's layer took half of balanced."""
    balanced = layer_latency_us(LAYER, 16, H100)
    for routing in ("power_law_1.01", "power_law_1.2"):
        assert layer_latency_us(replace(LAYER, routing=routing), 16, H100) < 0.7 * balanced
    several = replace(LAYER, routing="power_law_1.2")
    assert layer_latency_us(several, 4096, H100) == layer_latency_us(LAYER, 4096, H100)


@pytest.mark.parametrize(("tokens", "least", "most"), [(16, 0.01, 2.0), (64, 1.0, 51.2)])
@pytest.mark.parametrize("exponent", ["1.2", "1", "0.5"])
def test_active_experts_under_a_power_law_by_quadrature(
    tokens: int, least: float, most: float, exponent: str
) -> None:
    """Quantiles of x^-a, integrated on a fine grid here."""
    from moecc.hardware.routed_layer import _active_experts

    grid = np.geomspace(least, most, 200_001)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (grid[1:] ** -float(exponent)))])
    quantiles = np.interp((np.arange(128) + 0.5) / 128, mass / mass[-1], grid)
    expected = np.minimum(tokens * 8 * quantiles / quantiles.sum(), 1).sum()
    assert _active_experts(replace(LAYER, routing=f"power_law_{exponent}"), tokens) == pytest.approx(
        expected, rel=1e-3
    )


def test_moeccs_kernels_move_less_and_have_no_error() -> None:
    own = replace(LAYER, kernel="moecc")
    assert layer_latency_us(own, 4096, H100) < layer_latency_us(LAYER, 4096, H100)
    assert held_out_error_pct(own, H100) is None
    assert why_uncalibrated(own, H100) == "no measurement backs predictions of moecc's own kernels"


@pytest.mark.parametrize(
    ("changes", "device", "error", "reason"),
    [
        ({}, "h100-sxm", H100.error_pct["experts"], None),
        ({"dtype": "fp8_block"}, "h100-sxm", H100.error_pct["experts_fp8"], None),
        ({"dtype": "fp8"}, "h100-sxm", None, "the model was not fitted to fp8 on h100-sxm"),
        ({"dtype": "float16"}, "h100-sxm", None, "the model was not fitted to float16 on h100-sxm"),
        (
            {"routing": "power_law_1.2"},
            "h100-sxm",
            None,
            "the model was fitted under balanced routing only",
        ),
        (
            {},
            "b200-sxm",
            None,
            "b200-sxm is uncalibrated: datasheet figures, efficiencies of another device",
        ),
    ],
)
def test_the_error_is_that_of_what_was_measured(
    changes: dict[str, Any], device: str, error: float | None, reason: str | None
) -> None:
    layer = replace(LAYER, **changes)
    assert held_out_error_pct(layer, load_device(device)) == error
    assert why_uncalibrated(layer, load_device(device)) == reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "--hidden: 0 is not positive; hint: use 1 or more"),
        ({"top_k": 129}, "--top-k: 129 is more than 128 experts; hint: use 1 to 128"),
        ({"tp": 5}, "--tp: 5 does not divide intermediate 768; hint: use a divisor of the full intermediate"),
        ({"ep": 3}, "--ep: 3 does not divide experts 128; hint: use a divisor of the full experts"),
        ({"dtype": "fp4"}, "--dtype: unknown dtype 'fp4'; hint: known: bfloat16, float16, fp8_block, fp8"),
        ({"kernel": "sglang"}, "--kernel: unknown kernel 'sglang'; hint: known: vllm, moecc"),
        (
            {"routing": "power_law_x"},
            "--routing: unknown routing 'power_law_x'; "
            "hint: use balanced, or power_law_1.2 for a power law of exponent 1.2",
        ),
        (
            {"routing": "power_law_nan"},
            "--routing: unknown routing 'power_law_nan'; "
            "hint: use balanced, or power_law_1.2 for a power law of exponent 1.2",
        ),
    ],
)
def test_impossible_layers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        replace(LAYER, **changes)
    assert str(error.value) == message
