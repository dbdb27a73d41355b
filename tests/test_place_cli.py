"""`moecc place` as a user meets it: files that are complete or absent, a check that can fail, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moecc.cli import app
from moecc.errors import InputError
from moecc.frontend.trace import save_trace
from moecc.solvers.routing import assumed_routing

TOPOLOGY = """\
\tGPU0\tGPU1\tCPU Affinity
GPU0\t X \tNV18\t0-31
GPU1\tNV18\t X \t0-31
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    for seed, name in enumerate(("chat", "code")):
        routing = assumed_routing("zipf", layers=3, experts=8, top_k=2, tokens=1024, seed=seed)
        save_trace(path / f"{name}.npz", routing)
    (path / "topo.txt").write_text(TOPOLOGY)
    return path


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def invoke(*arguments: object) -> Any:
    """Runs in this process; errors come back as exceptions, as `main` sees them."""
    result = CliRunner().invoke(app, ["place", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


COMMON = ("chat.npz", "code.npz", "--devices", 4, "--nodes", 2, "--time-limit", 2)


def test_it_writes_a_placement_that_its_check_confirms(folder: Path) -> None:
    result = invoke(*COMMON, "--max-imbalance", 1.6, "-o", "placed.json")
    for text in (
        "held out: identity",
        "chat",
        "Unseen workloads",
        "home: ",
        "migrate: ",
        "written: placed.json",
    ):
        assert text in result.stdout
    data = json.loads((folder / "placed.json").read_text())
    assert data["schema"] == "moecc.placement/1"
    assert np.array(data["physical_to_logical_map"]).shape == (3, 8)
    checked = invoke("code.npz", "chat.npz", "--check", "placed.json")
    assert "figures agree with the traces" in checked.stdout
    data["report"]["after"]["fan_out"] *= 0.9
    (folder / "changed.json").write_text(json.dumps(data))
    with pytest.raises(Exception, match="1 of .* figures disagree") as caught:
        invoke("code.npz", "chat.npz", "--check", "changed.json")
    assert getattr(caught.value, "exit_code", None) == 1


def test_json_holds_the_report(folder: Path) -> None:
    result = invoke(*COMMON, "--json", "--no-leave-one-out", "--weight", 3, "--weight", 1, "-o", "w.json")
    summary = json.loads(result.stdout)
    assert summary["files"] == ["w.json"]
    assert [trace["weight"] for trace in summary["report"]["traces"].values()] == [3, 1]
    mean = summary["report"]["after"]["imbalance"]
    each = [w["imbalance"] for w in summary["report"]["after"]["workloads"].values()]
    assert mean == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    assert summary["report"]["unseen"] == []


def test_links_and_a_predicted_step(folder: Path) -> None:
    routing = assumed_routing("zipf", layers=16, experts=64, top_k=8, tokens=256)
    save_trace(folder / "olmoe.npz", routing)
    arguments = ("olmoe.npz", "--devices", 4, "--nodes", 2, "--topology", "topo.txt", "--time-limit", 3)
    result = invoke(
        *arguments, "--objective", "step", "--preset", "olmoe-1b-7b", "--no-leave-one-out", "-o", "step.json"
    )
    assert "predicted us per layer" in result.stdout
    assert "times are predictions; h100-sxm" in result.stdout
    assert "NV18" in result.stdout
    assert "agree" in invoke("olmoe.npz", "--check", "step.json").stdout


def test_it_writes_engines_files_and_says_how_to_launch(folder: Path) -> None:
    result = invoke(
        *COMMON,
        *("--export", "sglang:init.json", "--export", "trtllm:balance.yaml", "--dense-layer", 0),
        *("--no-leave-one-out", "-o", "exported.json"),
    )
    ours = json.loads((folder / "exported.json").read_text())["physical_to_logical_map"]
    theirs = json.loads((folder / "init.json").read_text())
    assert theirs == {"physical_to_logical_map": [list(range(8)), *ours]}
    assert "--init-expert-location" in result.stdout
    assert (folder / "balance.yaml").exists()


def test_it_moves_from_a_placement_in_force(folder: Path) -> None:
    invoke("chat.npz", "--devices", 4, "--time-limit", 1, "-o", "old.json")
    result = invoke(
        *("code.npz", "--devices", 4, "--time-limit", 2, "--from", "old.json", "--max-moved-gb", 0.05),
        *("--expert-mb", 10, "-o", "moved.json"),
    )
    assert "moves: " in result.stdout
    moves = json.loads((folder / "moved.json").read_text())["report"]["moves"]
    assert moves["moved_bytes"] <= 50_000_000
    assert "agree" in invoke("code.npz", "--check", "moved.json").stdout


def test_memory_gives_the_slots(folder: Path) -> None:
    # 3 layers: 3 slots of 10 MB take 90 MB, 4 take 120 MB.
    sizes = [part for gb in (0.2, 0.1, 0.2, 0.3) for part in ("--memory-per-device-gb", gb)]
    result = invoke(*COMMON, *sizes, "--expert-mb", 10, "--no-leave-one-out", "-o", "fit.json")
    data = json.loads((folder / "fit.json").read_text())
    assert data["slots_per_device"] == 3
    assert data["report"]["memory"] == {"expert_bytes": 10_000_000, "device_bytes": 90_000_000}
    assert "every device holds 0.09 GB of experts, 3 of 10 MB in each layer" in result.stdout
    assert "devices have up to 0.3 GB, but engines give all the same number of slots" in result.stdout
    assert "agree" in invoke("chat.npz", "code.npz", "--check", "fit.json").stdout


def test_it_draws(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    invoke(*COMMON, "--plot", "p.png", "--no-leave-one-out", "-o", "drawn.json")
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_file(folder: Path) -> None:
    for name in ("one.json", "two.json"):
        invoke(*COMMON, "--seed", 3, "--no-leave-one-out", "-o", name)
    one, two = (json.loads((folder / name).read_text()) for name in ("one.json", "two.json"))
    assert one["physical_to_logical_map"] == two["physical_to_logical_map"]
    assert one["report"] == two["report"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["missing.npz"], ["missing.npz", "no such file"]),
        (["chat.npz", "chat.npz"], ["two traces are named 'chat'", "hint"]),
        (["chat.npz", "--weight", "1", "--weight", "2"], ["--weight", "2 weights for 1 traces"]),
        (["chat.npz", "--devices", "6", "--nodes", "4"], ["--nodes", "multiple"]),
        (["chat.npz", "--devices", "4", "--slots-per-device", "1"], ["slots_per_device must be at least 2"]),
        (["chat.npz", "--memory-per-device-gb", "1"], ["--memory-per-device-gb", "--expert-mb"]),
        (
            ["chat.npz", "--devices", "4", "--memory-per-device-gb", "0.05", "--expert-mb", "10"],
            ["4 devices cannot hold 8 experts", "2 slots need 0.06 GB"],
        ),
        (["chat.npz", "--objective", "speed"], ["objective 'speed' is unknown"]),
        (["chat.npz", "--balance", "best"], ["balance 'best' is unknown"]),
        (["chat.npz", "--execution", "stay"], ["execution 'stay' is unknown"]),
        (["chat.npz", "--homes", "far"], ["--homes", "random, sequence or token"]),
        (["chat.npz", "--export", "sglang"], ["--export", "sglang:FILE"]),
        (["chat.npz", "--export", "tgi:f.json"], ["'tgi' is unknown"]),
        (["chat.npz", "--export", "sglang:none/f.json"], ["none/f.json", "folder does not exist"]),
        (["chat.npz", "--export", "sglang:f.json", "--dense-layer", "9"], ["--dense-layer"]),
        (["chat.npz", "--max-moved-gb", "1"], ["placement in force"]),
        (["chat.npz", "--expert-mb", "-1"], ["--expert-mb"]),
        (["chat.npz", "--dispatch", "far"], ["dispatch 'far' is unknown"]),
        (["chat.npz", "--max-imbalance", "0.5"], ["max_imbalance 0.5 is impossible"]),
        (["chat.npz", "--time-limit", "0"], ["time_limit_s"]),
        (["chat.npz", "--topology", "topo.txt"], ["topo.txt", "joins 2 devices, not 8"]),
        (["chat.npz", "--topology", "none.txt"], ["none.txt", "no such file"]),
        (["chat.npz", "--objective", "step"], ["--objective step", "--preset"]),
        (["chat.npz", "--objective", "step", "--preset", "olmoe-1b-7b"], ["--preset", "has 3 layers"]),
        (["chat.npz", "--from", "none.json"], ["none.json", "no such file"]),
        (["chat.npz", "-o", "none/p.json"], ["none/p.json", "folder does not exist"]),
        (["chat.npz", "--plot", "p.pdf"], ["p.pdf", ".png or .svg"]),
        (["chat.npz", "--check", "topo.txt"], ["topo.txt:1:2", "not valid JSON"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], parts: list[str], folder: Path
) -> None:
    before = sorted(folder.iterdir())
    output = [] if "-o" in arguments else ["-o", "never.json"]
    with pytest.raises(InputError) as caught:
        invoke(*arguments, *output)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_ctrl_c_writes_the_best_so_far(folder: Path) -> None:
    routing = assumed_routing("zipf", layers=48, experts=64, top_k=6, tokens=2048)
    save_trace(folder / "large.npz", routing)
    command = [sys.executable, "-m", "moecc", "place", "large.npz", "--time-limit", "60", "-o", "cut.json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=40)
    assert process.returncode == 0, stderr
    assert "interrupted: cut.json holds the best placement so far" in stderr
    assert "Traceback" not in stderr
    assert "written: cut.json" in stdout
    assert "agree" in invoke("large.npz", "--check", "cut.json").stdout
