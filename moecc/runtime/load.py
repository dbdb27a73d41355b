"""Loads emitted kernel modules on the best device at hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.artifact import Artifact
from moecc.codegen.layers import KernelSet
from moecc.errors import MoeccError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]  # by name, as emitted modules take them

_SWITCH = "TRITON_INTERPRET"


def best_device() -> tuple[str, str]:
    """(torch device, backend): a GPU where there is one, else Triton's interpreter on the host."""
    import torch

    if torch.cuda.is_available() and os.environ.get(_SWITCH) != "1":
        return "cuda", "hip" if torch.version.hip else "cuda"
    return "cpu", "interpreter"


def free_bytes(device: str) -> int:
    """Memory that can still be had on the device."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return _host_free_bytes()


def _host_free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _interpreting(wanted: bool) -> Iterator[None]:
    """Triton reads the switch when it decorates a kernel and when it launches one."""
    before = os.environ.get(_SWITCH)
    if wanted:
        os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before


@dataclass(frozen=True)
class Kernels:
    """One emitted module, loaded: its functions, called with the interpreter switched on where it is needed."""

    module: Any
    interpreted: bool

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        with _interpreting(self.interpreted):
            out: Tensor = self.module.forward(x, weights)
        return out

    def route(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        with _interpreting(self.interpreted):
            ids, topk_weights = self.module.route(x, weights)
        return ids, topk_weights

    def experts(self, x: Tensor, ids: Tensor, topk_weights: Tensor, weights: Weights) -> Tensor:
        with _interpreting(self.interpreted):
            out: Tensor = self.module.experts(x, ids, topk_weights, weights)
        return out

    def launches(self, tokens: int) -> tuple[str, ...]:
        return tuple(self.module.launches(tokens, self.target))

    @property
    def target(self) -> str:
        if self.interpreted:
            return "interpret"
        import torch

        if torch.version.hip:
            return str(torch.cuda.get_device_properties(0).gcnArchName.split(":")[0])
        return "sm_{}{}".format(*torch.cuda.get_device_capability())


def load_kernels(artifact: Artifact, kernels: KernelSet, device: str) -> Kernels:
    """Imports the set's module from the artifact. Raises MoeccError where the artifact has no code for the device."""
    path = artifact.folder / kernels.file
    digest = artifact.manifest["files"].get(kernels.file)
    if digest is None:
        raise MoeccError("is not in the artifact's manifest", where=str(path), hint="compile again")
    spec = importlib.util.spec_from_file_location(f"moecc_artifact_{kernels.name}_{digest[:16]}", path)
    if spec is None or spec.loader is None:
        raise MoeccError("cannot be imported", where=str(path), hint="compile again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is executed
    with _interpreting(device == "cpu"):
        spec.loader.exec_module(module)
    return Kernels(module, interpreted=device == "cpu")
