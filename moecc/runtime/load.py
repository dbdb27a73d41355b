"""Loads emitted kernel modules on the best device at hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.artifact import Artifact
from moecc.autotune.checking import choose_checked
from moecc.codegen.layers import KernelSet
from moecc.codegen.switches import freeze_configs
from moecc.errors import MoeccError

if TYPE_CHECKING:
    from torch import Tensor

AS_COMPILED = "as compiled"
Weights = Mapping[str, "Tensor"]  # by name, as emitted modules take them


def best_device() -> tuple[str, str]:
    """(torch device, backend): a GPU where there is one, else the CPU, natively. TRITON_INTERPRET=1 interprets.

    Raises MoeccError where no backend can run kernels.
    """
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu", "interpret"
    if torch.cuda.is_available():
        return "cuda", "hip" if torch.version.hip else "cuda"
    if not x86_level():
        raise MoeccError(
            "no GPU is here, and the CPU lacks AVX2",
            hint="TRITON_INTERPRET=1 runs kernels in Triton's interpreter",
        )
    return "cpu", "x86"


def x86_level() -> str:
    """The best level of instructions that kernels can use on this CPU, as `features.LEVELS` names it, empty if none."""
    from moecc.codegen.x86.errors import UnsupportedError
    from moecc.codegen.x86.features import choose_level

    try:
        return choose_level()
    except UnsupportedError:
        return ""


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


@dataclass(frozen=True)
class Kernels:
    """One emitted module, loaded: its functions, the target whose configs it runs with, and where those come from."""

    module: Any
    target: str
    configs: str = AS_COMPILED

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        out: Tensor = self.module.forward(x, weights)
        return out

    def route(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        ids, topk_weights = self.module.route(x, weights)
        return ids, topk_weights

    def experts(self, x: Tensor, ids: Tensor, topk_weights: Tensor, weights: Weights) -> Tensor:
        out: Tensor = self.module.experts(x, ids, topk_weights, weights)
        return out

    def launches(self, tokens: int) -> tuple[str, ...]:
        return tuple(self.module.launches(tokens, self.target))


def target_of(backend: str) -> str:
    """The target whose kernels run on the device at hand."""
    import torch

    if backend == "hip":
        return str(torch.cuda.get_device_properties(0).gcnArchName.split(":")[0])
    if backend == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return backend


def load_kernels(artifact: Artifact, kernels: KernelSet, backend: str) -> Kernels:
    """Imports the set's module from the artifact; configs that were tuned on this device replace those in it.

    Raises MoeccError where the artifact has no code for the backend.
    """
    path = artifact.folder / kernels.file
    digest = artifact.manifest["files"].get(kernels.file)
    if digest is None:
        raise MoeccError("is not in the artifact's manifest", where=str(path), hint="compile again")
    spec = importlib.util.spec_from_file_location(f"moecc_artifact_{kernels.name}_{digest[:16]}", path)
    if spec is None or spec.loader is None:
        raise MoeccError("cannot be imported", where=str(path), hint="compile again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    target = target_of(backend)
    if target not in module.CONFIGS:
        raise MoeccError(
            f"has no kernels for {target}", where=str(path), hint=f"compile again with --target {target}"
        )
    choice = choose_checked(kernels.shape, target)
    if choice.source == "default":
        return Kernels(module, target)
    module.launcher.configs = {**module.CONFIGS, target: freeze_configs(choice.configs)}
    return Kernels(module, target, f"tuned: {choice.because}")
