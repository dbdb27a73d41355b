"""Accelerators under the names that drivers report: what the ranking and the space need to know of each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from moecc.errors import InputError
from moecc.hardware import DeviceSpec, load_device

_FIGURES = ("cores", "memory_bandwidth_gb_s", "peak_tflops", "shared_memory_kb")


@dataclass(frozen=True, kw_only=True)
class Board:
    """cores: SMs or CUs. peak_tflops: dense, 16-bit. shared_memory_kb: what one program may use (LDS on AMD)."""

    name: str
    target: str
    cores: int
    memory_bandwidth_gb_s: float
    peak_tflops: float
    shared_memory_kb: float

    @property
    def is_amd(self) -> bool:
        return self.target.startswith("gfx")

    @property
    def wgmma_rows(self) -> int:
        """The smallest BLOCK_SIZE_M whose dot reads its operands from shared memory; 0 where there is none."""
        return 64 if self.target in ("sm_90", "sm_100") else 0


def find_board(name: str, *, where: str = "--device") -> Board:
    """The board of a moecc device (`h100-sxm`, or the path of its YAML file) or of a driver's name.

    Raises InputError for a name that is neither, and for a CPU, for which vLLM's Triton kernel has no configs.
    """
    known, reported = _boards(), name.replace(" ", "_")
    if reported in known:
        facts = known[reported]
        if "device" in facts:
            return _board_of(load_device(facts["device"]), reported)
        figures = {key: facts[key]["value"] for key in _FIGURES}
        return Board(name=reported, target=facts["target"], **figures)
    try:
        return _board_of(load_device(name), name)
    except InputError as error:
        close = difflib.get_close_matches(reported, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else error.hint
        raise InputError(error.message, where=error.where or where, hint=hint) from None


def board_names() -> list[str]:
    """The drivers' names that are known."""
    return list(_boards())


def _board_of(device: DeviceSpec, name: str) -> Board:
    if device.vendor not in ("nvidia", "amd"):
        raise InputError(
            f"device {device.name} is no GPU", where="--device", hint="vLLM's fused_moe kernel runs on GPUs"
        )
    return Board(
        name=name,
        target=device.target,
        cores=device.cores,
        memory_bandwidth_gb_s=device.memory_bandwidth_gb_s,
        peak_tflops=device.peak_tflops["bfloat16"],
        shared_memory_kb=device.shared_memory_kb,
    )


@cache
def _boards() -> dict[str, dict[str, Any]]:
    import yaml

    text = (resources.files("moecc.autotune") / "data" / "boards.yaml").read_text(encoding="utf-8")
    boards: dict[str, dict[str, Any]] = yaml.safe_load(text)["boards"]
    return boards
