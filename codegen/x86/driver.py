# mypy: ignore-errors
"""Triton's side of the runtime: CPU tensors in, machine code run by the launcher's threads.

Triton imports this module in every process that imports Triton, and asks X86Driver whether it is active: it stays
light, and breaks nothing where a GPU is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from moecc.codegen.x86.features import choose_level, supported_levels

NATIVE = ("runtime.h", "print.c", "arguments.c", "pool.c", "module.c")
"""The launcher's files, in the order in which they make one."""

FLUSH_BYTES = 64 << 20
"""Cleared before each run that `do_bench` times, less where the last cache is smaller."""

_NO_LIMIT = 1 << 30


@cache
def native():
    """The launcher, a Python extension that Triton's cache keeps."""
    from moecc.codegen.x86.glue import compile_module

    folder = Path(__file__).parent / "native"
    source = "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in NATIVE)
    return compile_module(source, "moecc_x86_launcher")


def make_launcher(src, metadata):
    """What runs a kernel, called with the grid, Triton's seven and the arguments of the launch."""
    from moecc.codegen.x86.glue import descriptor_flag_count, descriptor_flags
    from moecc.codegen.x86.signature import expander, make_parameter

    types = {str(name): type_ for name, type_ in src.signature.items()}
    plan = tuple(make_parameter(name, type_, descriptor_flag_count()) for name, type_ in types.items())
    slots = sum(parameter.slots for parameter in plan)
    if slots != metadata.slots:
        raise RuntimeError(
            f"{metadata.name}: {slots} runtime arguments for a kernel compiled for {metadata.slots}"
        )
    run = native().Launcher(metadata.name, plan, metadata.arena_bytes, metadata.spins, metadata.traced)
    expand = expander(tuple(types.values()), descriptor_flags)
    return run if expand is None else _expanding(run, expand)


def _expanding(run, expand):
    def launch(g0, g1, g2, stream, function, packed, metadata, enter, leave, *arguments):
        return run(g0, g1, g2, stream, function, packed, metadata, enter, leave, *expand(arguments))

    return launch


class _Utils:
    """What Triton asks of a device; there is no limit that a kernel could meet."""

    def __init__(self) -> None:
        self._loaded = []

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": _NO_LIMIT, "multiprocessor_count": os.cpu_count() or 1, "warpSize": 1}

    def load_binary(self, name: str, kernel: bytes, shared: int, device) -> tuple:
        """(library, address of its entry, registers, spills, most threads); libraries stay loaded."""
        with tempfile.NamedTemporaryFile(prefix="moecc-x86-", suffix=".so") as file:
            file.write(kernel)
            file.flush()
            library = ctypes.CDLL(file.name)
        self._loaded.append(library)
        return library, ctypes.cast(library.kernel_entry, ctypes.c_void_p).value, 0, 0, _NO_LIMIT


class _Event:
    """A point in time, as torch.cuda.Event has it."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._ns = 0

    def record(self, stream=None) -> None:
        self._ns = time.perf_counter_ns()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds until end."""
        return (end._ns - self._ns) / 1e6

    def synchronize(self) -> None:
        """Launches have ended when they return."""


class _DeviceInterface:
    Event = _Event

    @staticmethod
    def synchronize(device=None) -> None:
        """Launches have ended when they return."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1


class X86Driver(DriverBase):
    """Runs kernels on this CPU at one level, by default the best that it has or MOECC_X86_LEVEL."""

    def __init__(self, level: str | None = None) -> None:
        super().__init__()
        self.level = choose_level(level or os.environ.get("MOECC_X86_LEVEL"))
        self.utils = _Utils()
        self.launcher_cls = make_launcher
        self._target = GPUTarget("x86", self.level, 1)
        self._device = f"x86-{self.level}"

    @classmethod
    def is_active(cls) -> bool:
        """Where it is asked for, and where no other backend has a device."""
        if sys.platform != "linux" or platform.machine() != "x86_64" or not supported_levels():
            return False
        asked = os.environ.get("TRITON_DEFAULT_BACKEND")
        if asked:
            return asked == "x86"
        from moecc.codegen.x86.glue import other_backend_active

        return not other_backend_active("x86")

    def map_python_to_cpp_type(self, ty: str) -> str:
        if ty.startswith("*"):
            return "void*"
        return {"fp32": "float", "fp64": "double"}.get(ty, f"{'u' * ty.startswith('u')}int{ty[1:]}_t")

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """Levels are devices to Triton, which keeps kernels by device."""
        return self._device

    def set_current_device(self, device) -> None:
        """There is one."""

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        return _DeviceInterface

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench

    def get_empty_cache_for_benchmark(self):
        import torch

        return torch.empty(min(FLUSH_BYTES, _last_cache_bytes()), dtype=torch.int8)

    def clear_cache(self, cache) -> None:
        cache.zero_()


def _last_cache_bytes() -> int:
    """Of the CPU's last level; as much as is ever cleared where the system does not tell."""
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=FLUSH_BYTES)
