"""Every family from its config.json to kernels that compute the layer right: the command line, to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import CASES, FAMILIES

from moecc.frontend.hf_config import FAMILIES as KNOWN


def moecc(*arguments: object) -> str:
    command = [sys.executable, "-m", "moecc", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_family_is_among_the_cases() -> None:
    assert {CASES[case].config.model_type for case in FAMILIES} == set(KNOWN) - {"kimi_k2"}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_compiles_and_runs(case: str, tmp_path: Path) -> None:
    """In float32 against the float64 reference, which transformers' own blocks judge: tests/frontend."""
    CASES[case].config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    where = ["--hf-config", tmp_path, "--nodes", 1, "--devices-per-node", 1, "-o", tmp_path / "out"]
    report = json.loads(moecc("compile", *where, "--target", "sm_90", "--target", "x86", "--json"))
    assert {row["target"] for row in report["kernels"]} == {"sm_90", "x86"}
    assert not any(row["spill_bytes"] for row in report["kernels"])
    assert (CASES[case].spec(tmp_path).mamba is not None) == any("Mamba" in note for note in report["notes"])
    checked = json.loads(moecc("run", tmp_path / "out", "--tokens", 40, "--check", "--json"))
    assert checked["passed"]
    assert checked["relative_error"] < 1e-5
