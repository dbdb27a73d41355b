"""Whether to split the tokens of a step, and into how many chunks: the decision from which overlap gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.solvers.schedule.problem import Schedule, ScheduleProblem, serial_makespan
from moecc.solvers.schedule.solve import solve_schedule

_TIE = 1e-9  # relative difference of makespans that counts as none


@dataclass(frozen=True, kw_only=True)
class SplitDecision:
    """chunks: the chosen split.  schedules: one per candidate, each with its own bound.

    serial_us: the step with the fewest chunks on a single stream, which is what runs without any overlap.
    """

    chunks: int
    schedules: Mapping[int, Schedule]
    serial_us: float

    @property
    def schedule(self) -> Schedule:
        return self.schedules[self.chunks]

    @property
    def bound_us(self) -> float:
        """No schedule of any candidate is shorter."""
        return min(schedule.bound_us for schedule in self.schedules.values())


def best_split(
    candidates: Mapping[int, ScheduleProblem], *, time_limit_s: float = 10.0, seed: int = 0
) -> SplitDecision:
    """The candidate with the least makespan, keyed by its number of token chunks (1: no split).

    Ties go to fewer chunks. `time_limit_s` holds for each candidate. Splitting is no gain in itself: the weights of the
    experts are read once per chunk, so the durations of a candidate must be those of its smaller chunks.
    """
    if not candidates or min(candidates) < 1:
        raise InputError("best_split needs candidates with at least one chunk each")
    schedules = {
        chunks: solve_schedule(candidates[chunks], time_limit_s=time_limit_s, seed=seed)
        for chunks in sorted(candidates)
    }
    chosen = min(schedules)
    for chunks, schedule in schedules.items():
        if schedule.makespan_us < schedules[chosen].makespan_us * (1 - _TIE):
            chosen = chunks
    return SplitDecision(
        chunks=chosen, schedules=schedules, serial_us=serial_makespan(candidates[min(candidates)])
    )
