"""The machines that kernels are compiled for: what Triton needs to know about each, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One architecture.

    `shared_bytes` is what one program may use of on-chip memory: CUDA's opt-in maximum per block (CUDA C
    programming guide, table "technical specifications per compute capability"), LDS per workgroup on CDNA 3.
    `wgmma_rows` is the smallest BLOCK_M whose `tl.dot` becomes a warp-group instruction that reads its operands
    from shared memory, 0 where there is none: below it the last pipeline stage lives in registers.
    `max_warps` bounds one program: 1024 threads.
    On x86 a program is one thread: `arch` is the level that kernels are compiled ahead for, `shared_bytes` what its
    packed operands and sums may take of the second cache, and warps and stages mean nothing.
    """

    name: str
    backend: Literal["cuda", "hip", "x86", "interpret"]
    arch: int | str
    warp_size: int
    shared_bytes: int
    max_warps: int
    wgmma_rows: int = 0


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="sm_80", backend="cuda", arch=80, warp_size=32, shared_bytes=163 * 1024, max_warps=32),
        Target(
            name="sm_90",
            backend="cuda",
            arch=90,
            warp_size=32,
            shared_bytes=227 * 1024,
            max_warps=32,
            wgmma_rows=64,
        ),
        Target(
            name="sm_100",
            backend="cuda",
            arch=100,
            warp_size=32,
            shared_bytes=227 * 1024,
            max_warps=32,
            wgmma_rows=64,
        ),
        Target(
            name="gfx942", backend="hip", arch="gfx942", warp_size=64, shared_bytes=64 * 1024, max_warps=16
        ),
        # Memory, not a limit: past the 2 MiB of the second cache of the CPUs that have AMX a tile only gets slower.
        Target(
            name="x86", backend="x86", arch="amx", warp_size=1, shared_bytes=8 * 1024 * 1024, max_warps=32
        ),
        # Triton's interpreter: NumPy on the host. It has no limits of its own; 1 << 62 never binds.
        Target(
            name="interpret",
            backend="interpret",
            arch="host",
            warp_size=1,
            shared_bytes=1 << 62,
            max_warps=32,
        ),
    )
}
COMPILED_TARGETS = tuple(name for name, target in TARGETS.items() if target.backend != "interpret")


def find_target(name: str, *, where: str | None = None) -> Target:
    """The target of that name; InputError (exit code 2) for one that does not exist."""
    if name not in TARGETS:
        raise InputError(
            f"unknown target {name!r}", where=where, hint=f"known targets: {', '.join(COMPILED_TARGETS)}"
        )
    return TARGETS[name]
