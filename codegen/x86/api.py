"""Choosing this backend from Python. Triton is imported when it is chosen, not with this module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def activate(level: str | None = None) -> None:
    """Run Triton's kernels on this CPU from now on.

    `level`: avx2, avx512, avx512bf16 or amx, by default the best that the CPU has or MOECC_X86_LEVEL.
    UnsupportedError for a level that it lacks.
    """
    from moecc.codegen.x86.driver import X86Driver
    from moecc.codegen.x86.glue import swap_active_driver

    swap_active_driver(X86Driver(level))


@contextmanager
def activated(level: str | None = None) -> Iterator[None]:
    """`activate` for the length of a `with`."""
    from moecc.codegen.x86.driver import X86Driver
    from moecc.codegen.x86.glue import swap_active_driver

    before = swap_active_driver(X86Driver(level))
    try:
        yield
    finally:
        swap_active_driver(before)
