"""The environment of this machine, as its drivers and tools report it; what does not tell is an error."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from moecc.autotune.key import Environment
from moecc.errors import MoeccError

_CODEGEN = Path(__file__).resolve().parents[1] / "codegen"
_SOURCES = {".py", ".c", ".h"}


def x86_environment(*, measurement: str) -> Environment:
    """This CPU, with the cores that this process may use and the level that kernels are compiled for.

    The kernels' driver and assembler are moecc's own: their sources are in the hash. MoeccError where the system
    does not name the CPU.
    """
    from moecc.codegen.x86.features import choose_level, cpu_flags

    backend = _hash_of(_files(_CODEGEN / "x86"))
    return Environment(
        device=_cpu(),
        arch=choose_level(os.environ.get("MOECC_X86_LEVEL")),
        cores=len(os.sched_getaffinity(0)),
        features=tuple(flag for flag in cpu_flags() if flag.startswith(("avx", "amx", "fma"))),
        driver=f"moecc-x86 {backend}",
        assembler=f"llvm of triton {version('triton')}",
        triton=version("triton"),
        kernel_source=kernel_source_hash(),
        measurement=measurement,
    )


def gpu_environment(index: int = 0, *, measurement: str) -> Environment:
    """The CUDA or HIP device of that index. MoeccError where torch sees none, or a version cannot be found out."""
    import torch

    if not torch.cuda.is_available():
        raise _unknown("any GPU")
    device = torch.cuda.get_device_properties(index)
    arch, features, driver, assembler = _hip(device) if torch.version.hip else _cuda(device)
    return Environment(
        device=device.name,
        arch=arch,
        cores=device.multi_processor_count,
        features=features,
        driver=driver,
        assembler=assembler,
        triton=version("triton"),
        kernel_source=kernel_source_hash(),
        measurement=measurement,
    )


def kernel_source_hash() -> str:
    """Of the kernels' sources."""
    return _hash_of(_files(_CODEGEN / "kernels"))


def compiler_source_hash() -> str:
    """Of the kernels' sources and of all that turns them into binaries."""
    return _hash_of(_files(_CODEGEN))


def _cpu() -> str:
    """Name, family/model/stepping: the name alone is often that of many CPUs in a virtual machine."""
    text = _read(Path("/proc/cpuinfo"))
    fields = {
        name: re.search(rf"^{name}\s*:\s*(\S.*)$", text, flags=re.MULTILINE)
        for name in ("model name", "cpu family", "model", "stepping")
    }
    name, *numbers = (found[1].strip() if found else "" for found in fields.values())
    if not (name and all(numbers)):
        raise _unknown("the name of the CPU")
    return f"{name} ({'/'.join(numbers)})"


def _cuda(device: object) -> tuple[str, tuple[str, ...], str, str]:
    """Arch, features, driver, assembler. A slice of a GPU has fewer SMs, so `cores` tells it from the whole."""
    from triton.backends.nvidia.compiler import get_ptxas

    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(Path("/proc/driver/nvidia/version")))
    if found is None:
        raise _unknown("the version of the driver")
    major, minor = getattr(device, "major"), getattr(device, "minor")  # noqa: B009
    ptxas = get_ptxas(10 * major + minor)
    return f"sm_{major}{minor}", (), f"nvidia {found[1]}", f"ptxas {ptxas.version}"


def _hip(device: object) -> tuple[str, tuple[str, ...], str, str]:
    import torch

    arch, *features = str(getattr(device, "gcnArchName")).split(":")  # noqa: B009
    driver = _read(Path("/sys/module/amdgpu/version")).strip()
    if not driver:
        raise _unknown("the version of the driver")
    assembler = f"llvm of triton {version('triton')}, hip {torch.version.hip}"
    return arch, tuple(features), f"amdgpu {driver}", assembler


def _files(folder: Path) -> list[Path]:
    """MoeccError where there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES)
    if not found:
        raise _unknown("the kernels' sources")
    return found


def _hash_of(paths: Iterable[Path]) -> str:
    """Of names and contents."""
    total = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        total.update(f"{path.relative_to(_CODEGEN)} {len(data)}\n".encode() + data)
    return total.hexdigest()[:32]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unknown(what: str) -> MoeccError:
    return MoeccError(
        f"this machine does not tell {what}", where="autotune environment", hint="records cannot be kept"
    )
