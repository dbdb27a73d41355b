"""What was compiled once is found again by the next process, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moecc.autotune.binaries import FOLDER, Binaries
from moecc.autotune.defaults import default_configs
from moecc.codegen.aot import CompiledKernel, Job
from moecc.codegen.config import LayerShape
from moecc.codegen.resources import Resources

ROOT = Path(__file__).parents[2]
SHAPE = LayerShape(tokens=4, hidden=64, intermediate=64, experts=8, top_k=2)
JOB = Job(shape=SHAPE, configs=default_configs(SHAPE, "sm_90"), target="sm_90", kernels=("down",))
KERNEL = CompiledKernel(
    name="down",
    target="sm_90",
    assembly=".version 8.7\n// μ\n",
    assembly_suffix="ptx",
    binary=bytes(range(256)),
    binary_suffix="cubin",
    resources=Resources(registers=40, loop_instructions=12, matrix_instruction="mma"),
)
COMPILE = """
import json, sys
from pathlib import Path
from moecc.build import build_kernels
from moecc.codegen.config import LayerShape
from moecc.codegen.layers import KernelSet
shape = LayerShape(tokens=4, hidden=64, intermediate=64, experts=8, top_k=2)
sets = [KernelSet(name="moe", entry="forward", shape=shape, used_by=("moe",))]
built = build_kernels(sets, ("sm_90",), lambda stage, done, total: None)
files = {name: f if isinstance(f, str) else f.hex() for name, f in built.files.items()}
print(json.dumps([built.compiled, built.reused, built.configs, built.table, files]))
"""


def test_a_second_process_compiles_and_measures_nothing(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", COMPILE],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "MOECC_CACHE": str(tmp_path)},
        )
        results.append(json.loads(process.stdout))
    (compiled, reused, *first), (compiled_again, reused_again, *second) = results
    assert (compiled, reused) == (3, 0)
    assert (compiled_again, reused_again) == (0, 3)
    assert first == second
    assert {row["source"] for row in first[0]} == {"default"}


@pytest.mark.slow
def test_a_second_compile_of_an_example(tmp_path: Path) -> None:
    counts = []
    for number in range(2):
        out = tmp_path / str(number)
        process = subprocess.run(
            [sys.executable, "-m", "moecc", "compile", "examples/olmoe-1b-7b.yaml", "--json", "-o", str(out)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "MOECC_CACHE": str(tmp_path / "cache")},
        )
        counts.append(json.loads(process.stdout)["kernel_cache"])
    assert counts[0]["compiled"] > 0
    assert counts[1] == {"compiled": 0, "reused": counts[0]["compiled"] + counts[0]["reused"]}


def test_a_kernel_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Binaries.of(tmp_path)
    assert store.get(JOB) is None
    store.put(JOB, KERNEL)
    assert store.get(JOB) == KERNEL


def test_another_kernel_is_a_miss(tmp_path: Path) -> None:
    store = Binaries.of(tmp_path)
    store.put(JOB, KERNEL)
    down = replace(JOB.configs.down, num_stages=2)
    for other in (
        replace(JOB, kernels=("gate_up",)),
        replace(JOB, target="sm_80", configs=default_configs(SHAPE, "sm_80")),
        replace(JOB, configs=replace(JOB.configs, down=down)),
        replace(JOB, shape=replace(SHAPE, hidden=128)),
        replace(JOB, shape=replace(SHAPE, dtype="float16")),
    ):
        assert store.get(other) is None
    assert store.get(replace(JOB, shape=replace(SHAPE, tokens=5))) == KERNEL


def test_another_setting_of_triton_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Binaries.of(tmp_path)
    store.put(JOB, KERNEL)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    assert store.get(JOB) is None


def test_every_damage_is_a_miss(tmp_path: Path) -> None:
    store = Binaries.of(tmp_path)
    store.put(JOB, KERNEL)
    (path,) = (tmp_path / FOLDER).iterdir()
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 5)]
    for data in [*damaged, b"[]", b"{}", b"null", b"\xff"]:
        path.write_bytes(data)
        assert store.get(JOB) in (None, KERNEL)
        assert store.get(JOB) is None or json.loads(data)
    store.put(JOB, KERNEL)
    assert store.get(JOB) == KERNEL


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Binaries.of(tmp_path)
    jobs = [replace(JOB, shape=replace(SHAPE, hidden=64 * n)) for n in (1, 2, 3)]
    for job in jobs:
        store.put(job, KERNEL)
        time.sleep(0.01)
    size = max(path.stat().st_size for path in (tmp_path / FOLDER).iterdir())
    monkeypatch.setattr("moecc.autotune.binaries.MAX_BYTES", 2 * size)
    store.prune()
    assert [store.get(job) is None for job in jobs] == [True, False, False]


def test_wrong_settings_are_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_CACHE_TRUSTED", "no key")
    assert Binaries.of_user() == Binaries(None)


def test_no_folder_and_no_disk_are_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = Binaries.of(None)
    nowhere.put(JOB, KERNEL)
    nowhere.prune()
    assert nowhere.get(JOB) is None
    (tmp_path / "file").write_text("not a folder")
    blocked = Binaries.of(tmp_path / "file")
    for _ in range(2):
        blocked.put(JOB, KERNEL)
    blocked.prune()
    assert blocked.get(JOB) is None
    assert len(caplog.records) == 1
