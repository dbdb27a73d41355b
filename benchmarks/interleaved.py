"""Comparing functions on a machine that others use too: they take turns, and ratios are of neighbours in time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE_S = 0.02


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


def compare(sides: Mapping[str, Callable[[int], object]], *, rounds: int) -> Comparison:
    """Time every side once a round, the first side changing from round to round.

    A side is called with a number that counts its calls, to draw fresh data by. Before the timed call the threads of
    the side before get time to stop spinning (OpenMP's hold the cores for milliseconds after their work), and a call
    that is not timed wakes the side's own.
    """
    names, seconds = list(sides), {name: [0.0] * rounds for name in sides}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(PAUSE_S)
            sides[name](2 * number)
            began = time.perf_counter()
            sides[name](2 * number + 1)
            seconds[name][number] = time.perf_counter() - began
    return Comparison(seconds)


def load() -> str:
    """The load of the machine over the last minute, and its processors."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
