"""Tuning: what it finds, remembers and spends, on a device that is not there."""

from __future__ import annotations

import itertools
import logging
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_samples import SHAPE, FakeDevice, true_us, tuning, tuning_cache

from moecc.autotune.defaults import default_configs
from moecc.autotune.layer_configs import as_config, configs_of
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.tune import Budget, Progress
from moecc.autotune.upkeep import check
from moecc.errors import MoeccError

HERE = Path(__file__).parent
TUNERS = 16


def test_the_best_config_is_found_and_known_to_the_next_process(tmp_path: Path) -> None:
    device = FakeDevice()
    record = tuning(tuning_cache(tmp_path), device).run()
    assert record is not None
    best = configs_of(record.best.config)
    assert (best.gate_up.block_m, best.gate_up.block_n, best.down.block_n) == (8, 32, 64)
    assert record.best.median_us == pytest.approx(true_us(best))
    assert record.baseline_us == pytest.approx(true_us(default_configs(SHAPE, "x86")))
    later = FakeDevice()
    assert tuning(tuning_cache(tmp_path), later).run() == record
    assert not later.timed
    assert not later.prepared


def test_the_default_config_is_measured_first(tmp_path: Path) -> None:
    device = FakeDevice()
    tuning(tuning_cache(tmp_path), device, budget=Budget(trials=1)).run()
    assert device.timed[0] == default_configs(SHAPE, "x86")


@pytest.mark.parametrize("trials", [1, 7, 32])
def test_no_more_configs_are_measured_than_asked(trials: int, tmp_path: Path) -> None:
    device = FakeDevice()
    record = tuning(tuning_cache(tmp_path), device, budget=Budget(trials=trials)).run()
    assert record is not None
    assert len(record.measured) == 1 + trials
    assert len(device.prepared) == len(set(device.prepared)) == trials


def test_a_larger_budget_goes_on_where_the_smaller_ended(tmp_path: Path) -> None:
    first, second = FakeDevice(), FakeDevice()
    tuning(tuning_cache(tmp_path), first, budget=Budget(trials=6)).run()
    tuning(tuning_cache(tmp_path), second, budget=Budget(trials=20)).run()
    assert len(second.prepared) == 14
    assert not set(first.prepared) & set(second.prepared)


def test_a_time_limit_ends_a_race_and_keeps_what_was_measured(tmp_path: Path) -> None:
    class SlowDevice(FakeDevice):
        def time_us(self, configs, number):  # type: ignore[no-untyped-def]
            time.sleep(0.002)
            return super().time_us(configs, number)

    began = time.monotonic()
    device = SlowDevice()
    record = tuning(tuning_cache(tmp_path), device, budget=Budget(ends_at=began + 0.05)).run()
    assert record is not None
    assert len(record.measured) < 33
    assert tuning(tuning_cache(tmp_path), device, budget=Budget(ends_at=began)).run() is not None


def test_no_time_at_all_finds_nothing(tmp_path: Path) -> None:
    assert tuning(tuning_cache(tmp_path), FakeDevice(), budget=Budget(ends_at=0.0)).run() is None


def test_wrong_numbers_do_not_win_and_are_not_tried_again(tmp_path: Path) -> None:
    def wrong(configs):  # type: ignore[no-untyped-def]
        return "its result differs by 1.0e+00" if configs.gate_up.block_n == 32 else ""

    record = tuning(tuning_cache(tmp_path), FakeDevice(wrong=wrong)).run()
    assert record is not None
    failed = [item for item in record.measured if item.outcome == "failed"]
    assert failed
    assert {configs_of(item.config).gate_up.block_n for item in failed} == {32}
    assert {item.reason for item in failed} == {"its result differs by 1.0e+00"}
    assert configs_of(record.best.config).gate_up.block_n == 64
    again = FakeDevice(wrong=wrong)
    tuning(tuning_cache(tmp_path), again).run()
    assert not again.prepared


def test_a_default_that_fails_is_an_error(tmp_path: Path) -> None:
    device = FakeDevice(crashing=lambda configs: True)
    with pytest.raises(MoeccError, match=r"x86: the default config fails: its process ended with -11"):
        tuning(tuning_cache(tmp_path), device).run()


def test_progress_says_how_far_it_is(tmp_path: Path) -> None:
    told: list[Progress] = []
    tuning(tuning_cache(tmp_path), FakeDevice(), budget=Budget(trials=9), tell=told.append).run()
    assert (told[0].doing, told[0].known, told[0].best_us) == ("the default config", 0, None)
    assert [one.known for one in told] == sorted(one.known for one in told)
    assert {one.wanted for one in told} == {9}
    times = [one.best_us for one in told if one.best_us is not None]
    assert times == sorted(times, reverse=True)


def test_without_a_disk_the_best_is_still_found(caplog: pytest.LogCaptureFixture) -> None:
    record = tuning(tuning_cache(None), FakeDevice()).run()
    assert record is not None
    assert configs_of(record.best.config).gate_up.block_n == 32
    assert len(caplog.records) == 1


def test_a_full_disk_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    record = tuning(tuning_cache(tmp_path), FakeDevice()).run()
    assert record is not None
    assert len(record.measured) == 33
    assert [item.levelno for item in caplog.records] == [logging.WARNING]


def worker(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "tune_worker.py"), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_sixteen_tuners_at_once_lose_nothing_and_tear_nothing(tmp_path: Path) -> None:
    go, folder = tmp_path / "go", tmp_path / "cache"
    tuners = [worker(folder, "", 4, trials, go) for trials in range(5, 5 + TUNERS)]
    for tuner in tuners:
        assert tuner.stdout is not None
        assert tuner.stdout.readline() == "ready\n"
    go.touch()
    for tuner in tuners:
        tuner.communicate(timeout=240)
        assert tuner.returncode == 0
    assert check(Folder(folder)) == (4, {})
    for power in range(4):
        device = FakeDevice()
        tuning(tuning_cache(folder), device, tokens=1 << power, budget=Budget(trials=4 + TUNERS)).run()
        assert not device.prepared


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_tuner_resumes(kills: int, tmp_path: Path) -> None:
    """Nothing that stands in the cache is measured again: at most one stage is lost by each kill."""
    rng, prepared = random.Random(kills), 0
    for number in itertools.count():
        process = worker(tmp_path, "", 12, 24)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number < kills:
            time.sleep(rng.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
        prepared += process.communicate()[0].count("prepared")
        good, problems = check(Folder(tmp_path))
        assert not problems
        if number >= kills:
            break
    assert good == 12
    assert 12 * 24 <= prepared <= 12 * 24 + 8 * kills


def fleet(folder: Path, remote: str, *, machines: int = 20, shapes: int = 40) -> int:
    """Configs measured in all, where every machine tunes every shape, in an order of its own."""
    rng = random.Random(6)
    caches = [tuning_cache(folder / str(i), remote) for i in range(machines)]
    plans = [rng.sample(range(shapes), shapes) for _ in caches]
    measured = 0
    for step in range(shapes):
        for opened, plan in zip(caches, plans, strict=True):
            one = tuning(opened, FakeDevice(), budget=Budget(trials=6))
            layer = replace(SHAPE, hidden=512 + 32 * plan[step])
            one.shape, one.key = layer, opened[1].key(layer, "uniform")
            one.default = default_configs(layer, "x86")
            assert one.run() is not None
            measured += one.measured
    return measured


@pytest.mark.parametrize("kind", ["file", pytest.param("redis", marks=pytest.mark.slow)])
def test_a_fleet_that_shares_measures_a_twentieth(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = f"file://{tmp_path}/shared" if kind == "file" else request.getfixturevalue(f"{kind}_uri")
    remote = f"{uri}{'&' if '?' in uri else '?'}write=1&timeout_s=60"
    shared = fleet(tmp_path / "shared-by", remote)
    assert shared == 40 * 7
    assert fleet(tmp_path / "later", remote, machines=2) == 0


def test_machines_that_do_not_share_measure_everything(tmp_path: Path) -> None:
    assert fleet(tmp_path, "", machines=3) == 3 * 40 * 7


def test_configs_read_back() -> None:
    configs = default_configs(SHAPE, "x86")
    assert configs_of(as_config(configs)) == configs


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"down": None}, "down has other fields than GemmConfig"),
        ({"router": {"block_t": 16}}, "router has other fields than RouterConfig"),
        ({"extra": {}}, "it does not configure router, gate_up, down, combine"),
        ({"combine": {"fused_tokens": 0, "block_t": 1, "block_h": True, "num_warps": 1}}, "whole number"),
    ],
)
def test_configs_of_another_form_are_refused(change: dict[str, object], problem: str) -> None:
    config = {**as_config(default_configs(SHAPE, "x86")), **change}
    with pytest.raises(ValueError, match=problem):
        configs_of(config)
