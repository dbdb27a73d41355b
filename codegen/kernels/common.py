# mypy: ignore-errors
"""What several kernels need: conversions, a dot, the last-arrival test, the order of tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(values, BACKEND: tl.constexpr):
    """values in fp32. Triton's interpreter holds bf16 as raw integers: there the widening is a shift, and exact."""
    if BACKEND == "interpret" and values.dtype == tl.bfloat16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def narrow(values, dtype: tl.constexpr, BACKEND: tl.constexpr):
    """fp32 values in dtype, rounded to nearest even, which Triton's interpreter does not do for bf16."""
    if BACKEND == "interpret" and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    return values.to(dtype)


@triton.jit
def wrap(at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions inside [0, SIZE) in place of those past it; where blocks divide SIZE there are none.

    Then the positions stay contiguous for the compiler, which cannot see through a remainder.
    """
    if SIZE % BLOCK == 0:
        return at
    else:
        return at % SIZE


@triton.jit
def load_inside(ptrs, inside, WHOLE: tl.constexpr):
    """What ptrs hold, zero where it is not inside; a WHOLE block needs no mask."""
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, inside, other=0.0)


@triton.jit
def accumulate_dot(a, b, acc, BACKEND: tl.constexpr):
    """acc + a @ b in fp32; Triton's interpreter would multiply bf16 as raw integers."""
    if BACKEND == "interpret":
        return tl.dot(widen(a, BACKEND), widen(b, BACKEND), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def is_last_arrival(counter_ptr, arrivals, BACKEND: tl.constexpr):
    """True in exactly one of the `arrivals` programs that call this: the last one, which sees all they wrote.

    Nobody waits. The last program leaves the counter at zero, so that a captured graph can be replayed.
    """
    # The atomic releases one thread's writes: the barrier first gathers those of the whole program. On CDNA the
    # barrier does not wait for stores on their way to L2, so every wavefront does.
    if BACKEND == "hip":
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == arrivals - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def locate_tile(pid, num_tiles, COLUMN_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column block) of a program: GROUP_M row tiles walk the columns together and share L2."""
    group = pid // (GROUP_M * COLUMN_BLOCKS)
    within = pid % (GROUP_M * COLUMN_BLOCKS)
    tiles = min(num_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % tiles, within // tiles
