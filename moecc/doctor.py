"""What this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

from moecc.artifact import tool_versions

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
OPTIONAL = {"transformers": "trace record"}


def examine() -> dict[str, str | list[str]]:
    """Facts by name, in the order to print them; nothing is changed or compiled."""
    import torch

    from moecc.codegen.targets import COMPILED_TARGETS
    from moecc.runtime.load import x86_level

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    level = x86_level()
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if find_spec(name) is None]
    return {
        "python": platform.python_version(),
        "packages": [f"{name} {version}" for name, version in tool_versions().items()],
        "cpu": f"{os.cpu_count()} cores, {', '.join(_cpu_features()) or 'no vector extension known to moecc'}",
        "memory": f"{_memory_gb():.1f} GB",
        "gpus": gpus or ["none"],
        "compiles for": list(COMPILED_TARGETS),
        "x86 level": level or "none",
        "runs kernels": _runs_kernels(gpus, level),
        "c compiler": shutil.which("gcc") or shutil.which("cc") or "none",
        "missing extras": missing or ["none"],
    }


def _runs_kernels(gpus: list[str], level: str) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "through Triton's interpreter (TRITON_INTERPRET=1)"
    if gpus:
        return f"natively on {gpus[0]}"
    return f"natively on the CPU ({level})" if level else "not at all; TRITON_INTERPRET=1 interprets them"


def _cpu_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [feature for feature in CPU_FEATURES if feature in flags]


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
