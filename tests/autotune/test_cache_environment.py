"""The environment of this machine: all of it known, the same twice, another for another kernel."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecc.autotune import environment
from moecc.autotune.environment import gpu_environment, kernel_source_hash, x86_environment
from moecc.errors import MoeccError


def test_the_cpu_is_known() -> None:
    here = x86_environment(measurement="medians/1")
    assert here == x86_environment(measurement="medians/1")
    assert here.hash != x86_environment(measurement="medians/2").hash
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.device.rpartition(" (")[0] in Path("/proc/cpuinfo").read_text()


def test_a_machine_that_does_not_tell_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: "")
    with pytest.raises(MoeccError, match="does not tell the name of the CPU; hint: records cannot be kept"):
        x86_environment(measurement="medians/1")


def test_a_gpu_is_known_or_an_error() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(MoeccError, match="does not tell any GPU"):
            gpu_environment(measurement="medians/1")
        return
    here = gpu_environment(measurement="medians/1")
    assert here == gpu_environment(measurement="medians/1")
    assert here.device == torch.cuda.get_device_name(0)


@pytest.mark.parametrize("flavour", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_the_versions_of_a_gpu_are_those_of_driver_and_assembler(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"NVRM version: NVIDIA UNIX {flavour}  570.86.15  Fri Jan 1 12:00:00 UTC 2026\nGCC version:  gcc 12.2.0 (x)\n"
    monkeypatch.setattr(environment, "_read", lambda path: text)
    device = SimpleNamespace(major=9, minor=0)
    arch, _, driver, assembler = environment._cuda(device)
    assert (arch, driver) == ("sm_90", "nvidia 570.86.15")
    assert re.fullmatch(r"ptxas \d+\.\d+.*", assembler)


def test_another_kernel_is_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_source_hash()
    shutil.copytree(environment._CODEGEN / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(environment, "_CODEGEN", tmp_path)
    assert kernel_source_hash() == before
    with (tmp_path / "kernels" / "down.py").open("a") as file:
        file.write("#\n")
    assert kernel_source_hash() != before
    shutil.rmtree(tmp_path / "kernels")
    with pytest.raises(MoeccError, match="does not tell the kernels' sources"):
        kernel_source_hash()
