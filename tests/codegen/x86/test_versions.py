"""The same kernels compile and run with each minor version of Triton that is supported."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from moecc.codegen.x86.features import supported_levels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on"),
]
ROOT = Path(__file__).parents[3]
VERSIONS = ("3.5", "3.6", "3.7", "3.8", "3.9")


def install(folder: Path, version: str) -> Path:
    """The Python of a new environment with that Triton, NumPy and this backend, and nothing else."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*pip, f"triton=={version}.*", "numpy"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no Triton {version} for this Python: {done.stderr.strip().splitlines()[-1]}")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "moecc.pth").write_text(f"{ROOT}\n")
    metadata = packages / "moecc-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moecc\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[triton.backends]\nx86 = moecc.codegen.x86\n")
    return python


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_run(version: str, tmp_path: Path) -> None:
    python = install(tmp_path / "venv", version)
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    for level in supported_levels():
        environment = {**inherited, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "MOECC_X86_LEVEL": level}
        command = [
            str(python),
            str(Path(__file__).with_name("version_kernels.py")),
            str(sum(map(ord, version))),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, f"{level}: {run.stderr[-2000:]}"
        assert run.stdout.startswith(f"{version}.")
