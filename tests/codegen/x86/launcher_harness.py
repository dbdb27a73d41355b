"""The launcher with kernels written in C."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from moecc.codegen.x86.driver import native
from moecc.codegen.x86.signature import Signature, make_parameter


@cache
def kernels() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        source = Path(__file__).with_name("launcher_kernels.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


class Launch:
    """`Launch("visit", n="i32")(grid, arguments…)`."""

    def __init__(
        self, kernel: str, *, arena: int = 0, spins: bool = False, traced: bool = False, **types: Signature
    ):
        plan = tuple(make_parameter(name, type_, 2) for name, type_ in types.items())
        self.run = native().Launcher(kernel, plan, arena, spins, traced)
        self.address = ctypes.cast(getattr(kernels(), kernel), ctypes.c_void_p).value

    def __call__(self, grid: tuple[int, ...], *arguments: Any, enter: Any = None, leave: Any = None) -> None:
        grid = (*grid, 1, 1)[:3]
        self.run(*grid, 0, self.address, (), "metadata", enter, leave, *arguments)
