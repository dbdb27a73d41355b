"""A race of configs on one device, fair on a machine that others use too.

Every runner is timed once a round, and what counts is its time over that of the default config in the same round: what
slows the machine for longer than a round slows both. After each heat the slower half is out (successive halving), and
who is behind the best of earlier races, but nobody that the spread does not tell from the best. A runner's time is
the median of its ratios times the default's time, so that heats, and runs of the tuner, have one scale.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from moecc.codegen.config import KernelConfigs

HEATS = (3, 6, 12, 24)
"""Rounds that a runner has run after each heat."""
LEAST_LEAD = 0.02
"""Lead of the best, relative, that puts out: less is noise whatever the spread says."""


class CandidateError(Exception):
    """What is wrong with one config: it crashed, hung, did not compile or computed something else."""


class Device(Protocol):
    """Where configs are timed."""

    def prepare(self, candidates: Sequence[KernelConfigs], timeout_s: float) -> list[str]:
        """Compiles each and compares its result with the default's: what is wrong with it, or ""."""

    def time_us(self, configs: KernelConfigs, number: int) -> float:
        """Of one call on the data with that number, fresh for each. CandidateError for a config that fails."""


@dataclass(kw_only=True)
class Runner:
    """ratios: its times over the default's in the same rounds."""

    configs: KernelConfigs
    ratios: list[float] = field(default_factory=list)
    outcome: Literal["running", "timed", "stopped", "failed"] = "running"
    reason: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Difference of the quartiles of the ratios."""
        low, _, high = quartiles(self.ratios)
        return high - low


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[-1 - len(ordered) // 4]


def race(
    device: Device,
    default: KernelConfigs,
    candidates: Sequence[KernelConfigs],
    *,
    bar: float = math.inf,
    number: int = 0,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[list[Runner]]:
    """All runners after each heat. Whoever is not `running` any more has left with an outcome.

    bar: the best ratio that an earlier race found. number: of the first round; rounds draw data by their numbers.
    is_over: ends the race after a round; who has run less than all rounds is `stopped` then.
    """
    runners = [Runner(configs=configs) for configs in candidates]
    done = 0
    for rounds in HEATS:
        while done < rounds and not is_over():
            _round(device, default, _running(runners), number + done)
            done += 1
        if done:
            _put_out(runners, bar, last=done == HEATS[-1], over=done < rounds)
        yield runners
        if not _running(runners):
            return


def _running(runners: Sequence[Runner]) -> list[Runner]:
    return [runner for runner in runners if runner.outcome == "running"]


def _round(device: Device, default: KernelConfigs, runners: Sequence[Runner], number: int) -> None:
    """The order changes from round to round: who follows whom is part of what is measured."""
    base_us = device.time_us(default, number)
    start = number % max(len(runners), 1)
    for runner in [*runners[start:], *runners[:start]]:
        try:
            runner.ratios.append(device.time_us(runner.configs, number) / base_us)
        except CandidateError as error:
            runner.outcome, runner.reason = "failed", str(error)


def _put_out(runners: Sequence[Runner], bar: float, *, last: bool, over: bool) -> None:
    running = sorted(_running(runners), key=lambda runner: runner.ratio)
    if not running:
        return
    lead = 1 + max(LEAST_LEAD, running[0].spread / running[0].ratio)
    bound = lead * min(running[0].ratio, bar)
    for place, runner in enumerate(running):
        is_late = runner.ratio > bound and (place >= len(running) / 2 or runner.ratio > lead * bar)
        if last:
            runner.outcome = "timed"
        elif over or is_late:
            runner.outcome = "stopped"
