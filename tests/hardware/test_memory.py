"""Memory of one device, against published figures."""

from __future__ import annotations

import pytest

from moecc.hardware import (
    device_memory,
    expert_weight_bytes,
    gqa_kv_bytes_per_token,
    load_device,
    mla_kv_bytes_per_token,
)


def test_kv_cache_of_published_models() -> None:
    """DeepSeek-V3: 70.272 KB per token; Qwen2.5-72B: 327.680 KB; Llama-3.1-405B: 516.096 KB
    (table 1 of "Insights into DeepSeek-V3", arXiv:2505.09343, 16-bit)."""
    assert mla_kv_bytes_per_token(layers=61, kv_lora_rank=512, qk_rope_head_dim=64, element_bytes=2) == 70272
    assert gqa_kv_bytes_per_token(layers=80, kv_heads=8, head_dim=128, element_bytes=2) == 327680
    assert gqa_kv_bytes_per_token(layers=126, kv_heads=8, head_dim=128, element_bytes=2) == 516096


def test_routed_weights_of_deepseek_v3() -> None:
    """256 experts of 58 layers hold 653.9 of the 671 billion parameters."""
    expert = expert_weight_bytes(hidden=7168, intermediate=2048, element_bytes=1)
    assert 256 * 58 * expert == pytest.approx(653.9e9, rel=1e-3)
    assert expert_weight_bytes(hidden=8, intermediate=4, element_bytes=2, gated=False) == 2 * 2 * 32


def test_parts_add_up() -> None:
    use = device_memory(
        load_device("h100-sxm"),
        slots_per_device=9,
        expert_bytes=1000,
        moe_layers=10,
        replicated_bytes=500,
        kv_bytes_per_token=7,
        kv_tokens=100,
        workspace_bytes=30,
    )
    assert (use.weights_bytes, use.kv_cache_bytes, use.used_bytes) == (90500, 700, 91230)
    assert use.capacity_bytes == 80_000_000_000
    assert use.fits
    assert use.free_bytes == use.capacity_bytes - 91230


def test_deepseek_v3_needs_many_h100() -> None:
    """At fp8, 32 experts per device (8 devices) do not fit in 80 GB; 8 per device (32 devices) do."""
    expert = expert_weight_bytes(hidden=7168, intermediate=2048, element_bytes=1)
    fits = {}
    for devices in (8, 32):
        fits[devices] = device_memory(
            load_device("h100-sxm"),
            slots_per_device=256 // devices,
            expert_bytes=expert,
            moe_layers=58,
            replicated_bytes=17_000_000_000,
            kv_bytes_per_token=70272,
            kv_tokens=100_000,
        ).fits
    assert fits == {8: False, 32: True}
