"""The same kernels through Triton's interpreter, which shares no code with the compiler, give the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecc.codegen.x86.features import supported_levels

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")
SCRIPT = Path(__file__).parent / "agreement_kernels.py"


def run(folder: Path, name: str, **environment: str) -> dict[str, torch.Tensor]:
    """What each kernel wrote, in a process with these variables."""
    path = folder / f"{name}.pt"
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(path), "11"]
    subprocess.run(command, env={**inherited, **environment}, check=True)
    return dict(torch.load(path))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(tmp_path_factory.mktemp("interpreted"), "interpreted", TRITON_INTERPRET="1")


@pytest.mark.parametrize("level", supported_levels())
def test_compiled_and_interpreted(level: str, interpreted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    compiled = run(tmp_path, level, TRITON_DEFAULT_BACKEND="x86", MOECC_X86_LEVEL=level)
    assert compiled.keys() == interpreted.keys()
    for name, out in compiled.items():
        assert out.any()
        torch.testing.assert_close(
            out, interpreted[name], rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
