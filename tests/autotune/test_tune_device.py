"""Tuning on this CPU: candidates run in processes of their own, and bad ones cost themselves only."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bad_worker
import pytest
import torch

from moecc.autotune import checking, choose
from moecc.autotune.defaults import default_configs
from moecc.autotune.device import WorkerDevice
from moecc.autotune.draws import draw_routing
from moecc.autotune.layer_configs import UNIFORM, as_config, tuning_key
from moecc.autotune.record import Measurement, Record, now
from moecc.autotune.routing_class import local_shares, routing_class, shares_of
from moecc.cli import main
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.x86.features import supported_levels
from moecc.errors import InputError
from moecc.integrations.launchers import launcher_of
from moecc.solvers.routing import assumed_routing

SHAPE = LayerShape(tokens=4, hidden=64, intermediate=64, experts=8, top_k=2)
LAYER = ("--hidden", 64, "--intermediate", 64, "--experts", 8, "--top-k", 2)
native = pytest.mark.skipif(not supported_levels(), reason="this CPU runs no kernels natively")


def columns(block_n: int) -> KernelConfigs:
    default = default_configs(SHAPE, "x86")
    return replace(default, gate_up=replace(default.gate_up, block_n=block_n))


@native
def test_bad_candidates_cost_themselves_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    device = WorkerDevice(
        shape=SHAPE,
        target="x86",
        default=default_configs(SHAPE, "x86"),
        kernels=tmp_path,
        compilers=1,
        module="bad_worker",
        call_timeout_s=8.0,
    )
    sizes = ("DOES_NOT_COMPILE", "HANGS", "CRASHES", "WRONG", "GOOD")
    with device:
        problems = device.prepare([columns(getattr(bad_worker, size)) for size in sizes], timeout_s=120.0)
        assert problems[0] == "compiling: its process ended with -6"
        assert problems[1] == "it hung for 8 s"
        assert problems[2] == "its process ended with -11"
        assert problems[3].startswith("its result differs by ")
        assert problems[4] == ""
        assert 0 < device.time_us(columns(bad_worker.GOOD), 0) < 1e6
        assert device.compiled == 4


@pytest.fixture
def moecc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `moecc ...` with a cache of its own; (exit code, stdout, stderr)."""
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecc", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@native
def test_tuned_here_used_here(moecc: Any) -> None:
    code, out, err = moecc("tune", *LAYER, "--tokens", 4, "--trials", 3, "--json")
    assert code == 0, err
    (layer,) = json.loads(out)["layers"]
    assert (layer["measured"], layer["known"], layer["compiled"]) == (4, 4, 3)
    assert 0 < layer["best_us"] <= 1.01 * layer["default_us"]
    assert "4 tokens: the default config, 0 of 3 known" in err
    choice = choose.choose(SHAPE, "x86")
    assert (choice.source, as_config(choice.configs)) == ("tuned", layer["config"])
    assert layer["key"] in choice.because
    experts = replace(SHAPE, slots=8)
    assert checking.choose_checked(experts, "x86").configs == choice.configs
    assert choose.choose(replace(SHAPE, tokens=3), "x86").source == "tuned"
    assert choose.choose(replace(SHAPE, tokens=5), "x86").because == "not tuned on this device"
    again = json.loads(moecc("tune", *LAYER, "--tokens", 4, "--trials", 3, "--json")[1])["layers"][0]
    assert (again["measured"], again["compiled"], again["config"]) == (0, 0, layer["config"])


def record(configs: KernelConfigs, environment: str) -> Record:
    return Record(
        key=tuning_key(SHAPE, UNIFORM),
        environment=environment,
        measured=(Measurement(config=as_config(configs), median_us=1.0, spread_us=0.1),),
        baseline_us=2.0,
        date=now(),
        tools={},
    )


def kept(folder: Path, configs: KernelConfigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache that `choose` looks into."""
    monkeypatch.setenv("MOECC_CACHE", str(folder))
    environment = choose.environment_for("x86")
    assert not isinstance(environment, str)
    cache, space = choose.open_cache("x86", environment, choose.read_settings())
    space.key(SHAPE, UNIFORM)
    cache.put(record(configs, environment.hash))


@native
def test_launchers_of_torch_ops_run_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass walks the tiles of the forward pass, so the row tile of both is the tuned one."""
    default = default_configs(SHAPE, "x86")
    tuned = replace(
        default,
        gate_up=replace(default.gate_up, block_m=4, block_n=16),
        down=replace(default.down, block_m=4, block_n=32),
    )
    kept(tmp_path, tuned, monkeypatch)
    launcher_of.cache_clear()
    launcher = launcher_of((8, 128, 64), 2, 4, torch.bfloat16, False, "silu_glu", 1.702, 7.0, False, False)
    configs = launcher.configs["x86"]
    assert [configs[name]["BLOCK_N"] for name in ("gate_up", "down")] == [16, 32]
    assert {configs[name]["BLOCK_M"] for name in ("gate_up", "down", "grad_pre", "grad_x")} == {4}


@native
def test_a_config_that_computes_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path, columns(32), monkeypatch)
    monkeypatch.setattr(checking, "TOLERANCE", {"bfloat16": -1.0})
    monkeypatch.setattr("moecc.autotune.device_worker.TOLERANCE", {"bfloat16": -1.0})
    assert choose.choose(SHAPE, "x86").source == "tuned"
    choice = checking.choose_checked(SHAPE, "x86")
    assert choice.source == "default"
    assert choice.configs == default_configs(SHAPE, "x86")
    assert "its result differs by" in choice.because
    assert len(caplog.records) == 1


@native
def test_a_config_outside_the_space_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path, columns(48), monkeypatch)
    assert choose.choose(SHAPE, "x86").source == "default"


def test_a_target_that_is_not_here_has_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "GPU_FILES", ())
    choice = choose.choose(SHAPE, "sm_90")
    assert (choice.source, choice.because) == ("default", "no device for sm_90 is here")
    assert choice.configs == default_configs(SHAPE, "sm_90")


def test_settings_that_contradict_each_other_stop_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    monkeypatch.setenv("MOECC_CACHE_REMOTE", "ftp://nowhere")
    for _ in range(3):
        assert choose.choose(SHAPE, "x86").configs == default_configs(SHAPE, "x86")
    assert len(caplog.records) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", 64), "--intermediate: is missing; hint: give the layer's four sizes, or an artifact"),
        ((*LAYER, "--trials", 0), "--trials: 0 is not positive"),
        ((*LAYER, "--time-limit", 0), "--time-limit: 0.0 is no time"),
        ((*LAYER, "--time-limit", "nan"), "--time-limit: nan is no time"),
        (("nowhere", *LAYER), "--hidden: an artifact has its sizes"),
        (("nowhere", "--ep", 2), "--ep: an artifact has its sizes"),
        ((*LAYER, "--no-gated"), "--no-gated: is for rankings only"),
        (("nowhere",), "nowhere: is not a moecc artifact"),
        ((*LAYER, "--dtype", "fp8"), "layer shape: dtype 'fp8' is none of"),
        ((*LAYER, "--tokens", "x"), "--tokens: 'x' is no count of tokens"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[object, ...], message: str, moecc: Any) -> None:
    code, out, err = moecc("tune", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_draws_follow_their_shares() -> None:
    shape = replace(SHAPE, tokens=4096, shared=1)
    shares = (0.5, 0.3, *[0.2 / 6] * 6)
    draw = draw_routing(shape, 0, shares, torch.Generator().manual_seed(1), "cpu")
    assert draw.ids.shape == (4096, 3)
    assert (draw.ids[:, 2] == 8).all()
    assert (draw.ids[:, 0] != draw.ids[:, 1]).all()
    assert torch.allclose(draw.topk_weights[:, :2].sum(1), torch.ones(4096))
    counts = torch.bincount(draw.ids[:, :2].flatten().long(), minlength=8).double()
    assert counts[0] > counts[1] > 2 * counts[2:].max()
    assert (counts > 0).all()


def test_single_tokens_take_all_experts_in_turn() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [draw_routing(replace(SHAPE, tokens=1), n, (), generator, "cpu").ids for n in range(4)]
    assert sorted(torch.cat(draws).flatten().tolist()) == list(range(8))


def test_received_tokens_bring_the_rows_of_a_device() -> None:
    shape = replace(SHAPE, tokens=1024, slots=4, received=1700, experts=8)
    ids = draw_routing(shape, 0, (), torch.Generator().manual_seed(1), "cpu").ids
    here = ids < 4
    assert here[:, 0].all()
    assert int(here.sum()) == pytest.approx(1024 * 2, rel=0.05)
    assert (ids[~here] == 4).all()


def test_classes_of_routings() -> None:
    uniform = assumed_routing("uniform", layers=3, experts=64, top_k=4)
    zipf = assumed_routing("zipf", layers=3, experts=64, top_k=4, alpha=1.0)
    assert routing_class(shares_of([uniform])) == routing_class(()) == UNIFORM
    assert routing_class(shares_of([zipf])) in ("skew-2", "skew-4")
    assert routing_class([1.0, *[0.0] * 15]) == "skew-16"
    assert sum(shares_of([uniform, zipf])) == pytest.approx(1)


def test_shares_of_a_device_are_some_of_all() -> None:
    held = replace(SHAPE, slots=4)
    assert local_shares((0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05), held, "t.npz") == pytest.approx(
        [0.3 / 0.55, 0.1 / 0.55, 0.1 / 0.55, 0.05 / 0.55]
    )
    with pytest.raises(InputError, match=r"t\.npz: it routes to 2 experts, the layer has 8"):
        local_shares((0.5, 0.5), held, "t.npz")
