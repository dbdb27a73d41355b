"""What one device must hold: weights of its expert slots, everything replicated, KV cache, workspace."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.hardware.spec import DeviceSpec


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one device."""

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    capacity_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes

    @property
    def free_bytes(self) -> int:
        """Negative where the device is too small."""
        return self.capacity_bytes - self.used_bytes

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0


def device_memory(
    device: DeviceSpec,
    *,
    slots_per_device: int,
    expert_bytes: int,
    moe_layers: int,
    replicated_bytes: int,
    kv_bytes_per_token: int,
    kv_tokens: int,
    workspace_bytes: int = 0,
) -> MemoryUse:
    """Memory of one device under expert parallelism with replicated attention (data parallelism).

    expert_bytes: weights of one expert of one layer.  replicated_bytes: what every device holds whole: shared
    experts, dense layers, attention, embeddings, routers.  kv_bytes_per_token: over all layers
    (`gqa_kv_bytes_per_token`, `mla_kv_bytes_per_token`).  kv_tokens: cached tokens of this device's sequences.
    """
    return MemoryUse(
        weights_bytes=slots_per_device * expert_bytes * moe_layers + replicated_bytes,
        kv_cache_bytes=kv_bytes_per_token * kv_tokens,
        workspace_bytes=workspace_bytes,
        capacity_bytes=device.memory_bytes,
    )


def expert_weight_bytes(*, hidden: int, intermediate: int, element_bytes: int, gated: bool = True) -> int:
    """Weights of one expert: up (and gate) [intermediate, hidden] and down [hidden, intermediate]."""
    return (3 if gated else 2) * hidden * intermediate * element_bytes


def gqa_kv_bytes_per_token(*, layers: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """One key and one value per KV head and layer."""
    return 2 * layers * kv_heads * head_dim * element_bytes


def mla_kv_bytes_per_token(
    *, layers: int, kv_lora_rank: int, qk_rope_head_dim: int, element_bytes: int
) -> int:
    """One latent and one rotary key per layer, shared by all heads (DeepSeek-V2, arXiv:2405.04434)."""
    return layers * (kv_lora_rank + qk_rope_head_dim) * element_bytes
