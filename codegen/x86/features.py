"""What a CPU can do, by the features that it reports and never by the name of its model."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moecc.codegen.x86.errors import UnsupportedError

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
"""Linux on x86-64: the system call, ARCH_REQ_XCOMP_PERM, and the feature."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of vector and tile instructions; `flags` are those of /proc/cpuinfo that it needs.

    `cpu` and `llvm` are LLVM's base CPU and what is switched on beside it. Of AVX512-BF16 only the product is used:
    its conversions flush subnormal numbers. A CPU that has tiles, but may not use them, does better without: the
    product of pairs was measured there at half the rate of multiply-adds.
    """

    name: str
    flags: frozenset[str]
    vector_bytes: int
    cpu: str
    llvm: str = ""
    pairs: bool = False
    amx: bool = False

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector register."""
        return self.vector_bytes // 4


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512BF16 = _AVX512 | {"avx512_bf16"}
_AMX = _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"}

LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(name="avx2", flags=_AVX2, vector_bytes=32, cpu="x86-64-v3"),
        Level(name="avx512", flags=_AVX512, vector_bytes=64, cpu="x86-64-v4", llvm="-prefer-256-bit"),
        Level(
            name="avx512bf16",
            flags=_AVX512BF16,
            vector_bytes=64,
            cpu="x86-64-v4",
            llvm="-prefer-256-bit,+avx512bf16",
            pairs=True,
        ),
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


@cache
def amx_permitted() -> bool:
    """Whether the kernel lets this process use tiles, which it has to be asked for once (arch_prctl).

    Threads and child processes inherit the permission.
    """
    if "amx_tile" not in cpu_flags():
        return False
    system_call = ctypes.CDLL(None).syscall
    return int(system_call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def choose_level(asked: str | None = None) -> str:
    """The level asked for, by default the best of this CPU; UnsupportedError for one that it cannot run."""
    here = [name for name in supported_levels() if not LEVELS[name].amx or amx_permitted()]
    if asked is None and here:
        slow_pairs = "amx_bf16" in cpu_flags()
        return [name for name in here if not (LEVELS[name].pairs and slow_pairs)][-1]
    if asked in here:
        return str(asked)
    hint = f"this CPU runs {', '.join(here)}" if here else "this CPU has no AVX2"
    raise UnsupportedError(f"level {asked or 'avx2'}{_why_not(asked)}", hint=hint)


def _why_not(asked: str | None) -> str:
    level = LEVELS.get(asked or "avx2")
    if level is None:
        return f" (known are {', '.join(LEVELS)})"
    lacking = sorted(level.flags - cpu_flags())
    return f" (no {', '.join(lacking)})" if lacking else " (the kernel does not permit tiles)"
