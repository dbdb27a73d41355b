"""Tuning of one layer on one device: the default config first, then what is likely better, all of it remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc.autotune.cache import Cache
from moecc.autotune.candidates import next_candidates
from moecc.autotune.key import Key
from moecc.autotune.layer_configs import as_config, bucketed, configs_of
from moecc.autotune.race import HEATS, CandidateError, Device, Runner, quartiles, race
from moecc.autotune.record import Measurement, Record, now
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.targets import Target
from moecc.errors import MoeccError

COMPILE_TIMEOUT_S = 120.0
Propose = Callable[[KernelConfigs, LayerShape, Target, Callable[[KernelConfigs], bool]], list[KernelConfigs]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """trials: configs in the record besides the default, those of earlier runs and of other machines too.
    ends_at: by `time.monotonic`; what is compiling then is waited for, what is racing stops after its round.
    """

    trials: int = 32
    ends_at: float = float("inf")

    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where tuning is: what it does, configs known of those wanted, best and default so far, None before."""

    doing: str
    known: int
    wanted: int
    best_us: float | None
    baseline_us: float | None


Tell = Callable[[Progress], None]


@dataclass(kw_only=True)
class Tuning:
    """One layer being tuned: what is known of it, and what was measured just now."""

    cache: Cache
    key: Key
    shape: LayerShape
    target: Target
    default: KernelConfigs
    device: Device
    budget: Budget
    tools: Mapping[str, str]
    tell: Tell = lambda progress: None
    propose: Propose = next_candidates
    record: Record | None = None
    measured: int = 0
    rounds: int = 0
    _known: set[str] = field(default_factory=set)

    def run(self) -> Record | None:
        """The record at the end, None where the time did not suffice for the default. MoeccError if that fails."""
        self._keep(self.cache.get(self.key))
        while not self.budget.is_over() and self.trials_left > 0:
            if self.record is None or self.record.baseline_us is None or not self._is_known(self.default):
                self._measure_default()
                continue
            best = configs_of(self.record.best.config)
            fresh = self.propose(best, bucketed(self.shape), self.target, self._is_known)
            if not fresh:
                break
            self._measure(fresh[: self.trials_left])
        return self.record

    @property
    def trials_left(self) -> int:
        return self.budget.trials - len(self._known - {_text(self.default)})

    def _measure_default(self) -> None:
        self._say("the default config")
        try:
            times = [self.device.time_us(self.default, number) for number in range(HEATS[-1])]
        except CandidateError as error:
            raise MoeccError(f"the default config fails: {error}", where=self.target.name) from None
        low, median_us, high = quartiles(times)
        self.rounds += len(times)
        self._put(
            [Measurement(config=as_config(self.default), median_us=median_us, spread_us=high - low)],
            baseline_us=median_us,
        )

    def _measure(self, candidates: Sequence[KernelConfigs]) -> None:
        self._say(f"compiling {len(candidates)} configs")
        timeout_s = min(COMPILE_TIMEOUT_S, max(self.budget.left_s, 1.0))
        problems = self.device.prepare(candidates, timeout_s)
        failed = [
            Measurement(config=as_config(configs), outcome="failed", reason=_printable(problem))
            for configs, problem in zip(candidates, problems, strict=True)
            if problem and not self.budget.is_over()
        ]
        self._put(failed)
        running = [configs for configs, problem in zip(candidates, problems, strict=True) if not problem]
        if not running or self.record is None or self.record.baseline_us is None:
            return
        baseline_us, best_us = self.record.baseline_us, self.record.best.median_us or float("inf")
        for runners in race(
            self.device,
            self.default,
            running,
            bar=best_us / baseline_us,
            number=self.rounds,
            is_over=self.budget.is_over,
        ):
            self._say(f"measuring {sum(runner.outcome == 'running' for runner in runners)} configs")
            self._put([_measurement(runner, baseline_us) for runner in runners if _is_told(runner)])
        self.rounds += HEATS[-1]

    def _is_known(self, configs: KernelConfigs) -> bool:
        return _text(configs) in self._known

    def _put(self, measured: Sequence[Measurement], baseline_us: float | None = None) -> None:
        """At once: what is measured survives a kill."""
        if not measured:
            return
        before = len(self._known)
        known = self.record.measured if self.record else ()
        texts = {item.text for item in measured}
        kept = tuple(item for item in known if item.text not in texts)
        self._keep(
            self.cache.put(
                Record(
                    key=self.key,
                    environment=self.cache.environment.hash,
                    measured=(*measured, *kept),
                    baseline_us=baseline_us or (self.record.baseline_us if self.record else None),
                    date=now(),
                    tools=self.tools,
                )
            )
        )
        self.measured += len(self._known) - before

    def _keep(self, record: Record | None) -> None:
        if record is not None:
            self.record = record
            self._known = {item.text for item in record.measured if item.outcome != "claimed"}

    def _say(self, doing: str) -> None:
        record = self.record
        best_us = record.best.median_us if record else None
        baseline_us = record.baseline_us if record else None
        known = self.budget.trials - max(self.trials_left, 0)
        self.tell(
            Progress(
                doing=doing,
                known=known,
                wanted=self.budget.trials,
                best_us=best_us,
                baseline_us=baseline_us,
            )
        )


def _is_told(runner: Runner) -> bool:
    return runner.outcome == "failed" or bool(runner.ratios)


def _measurement(runner: Runner, baseline_us: float) -> Measurement:
    """A runner that is still running has as many rounds as one that was stopped now."""
    config = as_config(runner.configs)
    if runner.outcome == "failed":
        return Measurement(config=config, outcome="failed", reason=_printable(runner.reason))
    return Measurement(
        config=config,
        outcome="timed" if runner.outcome == "timed" else "stopped",
        median_us=runner.ratio * baseline_us,
        spread_us=runner.spread * baseline_us,
    )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:200]


def _text(configs: KernelConfigs) -> str:
    return Measurement(config=as_config(configs), outcome="failed", reason="").text
