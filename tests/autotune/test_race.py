"""Races: the fastest wins though the machine's speed changes, and those behind leave early."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_samples import SHAPE, FakeDevice, true_us

from moecc.autotune.defaults import default_configs
from moecc.autotune.race import HEATS, Runner, race
from moecc.codegen.config import KernelConfigs

DEFAULT = default_configs(SHAPE, "x86")


def columns(block_n: int) -> KernelConfigs:
    return replace(DEFAULT, gate_up=replace(DEFAULT.gate_up, block_n=block_n))


def finished(device: FakeDevice, candidates: list[KernelConfigs], **options: float) -> dict[int, Runner]:
    runners: list[Runner] = []
    for heat in race(device, DEFAULT, candidates, **options):  # type: ignore[arg-type]
        runners = heat
    return {runner.configs.gate_up.block_n: runner for runner in runners}


def test_ratios_survive_a_machine_that_slows_down() -> None:
    """Every round is half as fast as the one before: no absolute time means anything."""
    device = FakeDevice(factor=lambda number: 2.0**number)
    found = finished(device, [columns(n) for n in (16, 32, 64, 128)])
    assert found[32].outcome == "timed"
    assert found[32].ratio == pytest.approx(true_us(columns(32)) / true_us(DEFAULT))
    assert found[32].spread == pytest.approx(0)
    assert len(found[32].ratios) == HEATS[-1]


def test_the_slower_half_leaves_after_each_heat() -> None:
    found = finished(FakeDevice(), [columns(n) for n in (32, 64, 128, 256)])
    assert {n: len(runner.ratios) for n, runner in found.items()} == {
        32: HEATS[-1],
        64: HEATS[1],
        128: HEATS[0],
        256: HEATS[0],
    }
    assert [runner.outcome for runner in found.values()] == ["timed", "stopped", "stopped", "stopped"]


def test_who_is_behind_an_earlier_best_leaves_at_once() -> None:
    found = finished(FakeDevice(), [columns(128), columns(256)], bar=0.5)
    assert {len(runner.ratios) for runner in found.values()} == {HEATS[0]}


def test_a_crash_costs_one_runner() -> None:
    device = FakeDevice(crashing=lambda configs: configs.gate_up.block_n == 32)
    found = finished(device, [columns(32), columns(64)])
    assert found[32].outcome == "failed"
    assert found[32].reason == "its process ended with -11"
    assert found[64].outcome == "timed"


def test_time_that_is_over_stops_after_a_round() -> None:
    device = FakeDevice()
    heats = list(race(device, DEFAULT, [columns(32)], is_over=lambda: len(device.timed) >= 4))
    assert len(heats) == 1
    assert (heats[0][0].outcome, len(heats[0][0].ratios)) == ("stopped", 2)


@given(st.integers(0, 10_000))
def test_noise_that_hits_single_calls_does_not_choose_a_slow_config(seed: int) -> None:
    """One call in six takes up to three times as long, at random; the winner is within 5 % of the best."""
    rng = random.Random(seed)
    device = FakeDevice(factor=lambda number: rng.uniform(1, 3) if rng.random() < 1 / 6 else 1.0)
    found = finished(device, [columns(n) for n in (16, 32, 64, 128, 256)])
    best = min((runner for runner in found.values() if runner.outcome == "timed"), key=lambda r: r.ratio)
    assert true_us(best.configs) <= 1.05 * min(true_us(columns(n)) for n in (16, 32, 64))
