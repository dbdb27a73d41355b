"""Comparing functions on a machine that others use too: they take turns, and ratios are of neighbours in time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds of every side in every round, in the order of the rounds."""

    seconds: Mapping[str, list[float]]

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratios(self, side: str, *others: str) -> tuple[float, float, float]:
        """How many times as fast as the best of the others: lower quartile, median, upper quartile of the rounds."""
        best = [min(times) for times in zip(*(self.seconds[other] for other in others), strict=True)]
        rounds = sorted(theirs / ours for ours, theirs in zip(self.seconds[side], best, strict=True))
        quarter = len(rounds) // 4
        return rounds[quarter], statistics.median(rounds), rounds[-1 - quarter]


def compare(sides: Mapping[str, Callable[[int], object]], *, rounds: int, warm: int = 1) -> Comparison:
    """Call every side once a round with the number of the round, the first side changing from round to round."""
    for number in range(warm):
        for run in sides.values():
            run(number)
    names, seconds = list(sides), {name: [0.0] * rounds for name in sides}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            sides[name](number)
            seconds[name][number] = time.perf_counter() - began
    return Comparison(seconds)


def load() -> str:
    """The load of the machine over the last minute, and its processors."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
