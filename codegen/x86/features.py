"""What a CPU can do, by the features that it reports and never by the name of its model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of vector and tile instructions; `flags` are those of /proc/cpuinfo that it needs.

    `cpu` and `llvm` are LLVM's base CPU and what is switched on beside it. bf16 conversions of AVX512-BF16 are left
    off on purpose: they flush subnormal numbers.
    """

    name: str
    flags: frozenset[str]
    vector_bytes: int
    cpu: str
    llvm: str = ""
    amx: bool = False

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector register."""
        return self.vector_bytes // 4


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"}

LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(name="avx2", flags=_AVX2, vector_bytes=32, cpu="x86-64-v3"),
        Level(name="avx512", flags=_AVX512, vector_bytes=64, cpu="x86-64-v4", llvm="-prefer-256-bit"),
        Level(
            name="amx",
            flags=_AMX,
            vector_bytes=64,
            cpu="x86-64-v4",
            llvm="-prefer-256-bit,+amx-tile,+amx-bf16,+amx-int8",
            amx=True,
        ),
    )
}
"""From the least to the most."""


@cache
def cpu_flags() -> frozenset[str]:
    """The flags of the first processor; empty where /proc/cpuinfo does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def supported_levels(flags: frozenset[str] | None = None) -> tuple[str, ...]:
    """The levels that a CPU of these flags (by default this one) can run, from the least to the most."""
    flags = cpu_flags() if flags is None else flags
    return tuple(name for name, level in LEVELS.items() if level.flags <= flags)
