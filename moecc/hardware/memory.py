"""What one device must hold."""

from __future__ import annotations

from dataclasses import dataclass


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
