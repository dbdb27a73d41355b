"""What tuning found out about one key, and the union of two such findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from moecc.autotune.canonical import MAX_INTEGER, canonical, is_scalar
from moecc.autotune.key import MAX_FIELDS, Key
from moecc.errors import InputError

Config = Mapping[str, Any]
"""Scalars by name, or one level of such objects by the kernel's name."""

Outcome = Literal["timed", "claimed", "stopped", "failed"]
MAX_MEASURED = 8192
DATE_FORMAT = "%Y-%m-%dT%H:%M:%S+00:00"
_WITHOUT_TIME = {"failed": "failed", "claimed": "is claimed"}
_TRUST = {"failed": 0, "timed": 1, "stopped": 2, "claimed": 3}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One config on the device.

    timed: all repeats of the policy, and the result was right. stopped: behind in a race, fewer repeats.
    failed: crashed, hung or computed wrongly, for the `reason` given; without a time.
    claimed: a file of another tuner calls it the best and gives no time.
    median_us, spread_us: of the repeats; the spread is the difference of the quartiles.
    Raises InputError for what cannot be stored or is no measurement.
    """

    config: Config
    outcome: Outcome = "timed"
    median_us: float | None = None
    spread_us: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if problem := self._why_impossible():
            raise InputError(problem, where="measurement")

    def _why_impossible(self) -> str | None:
        if self.outcome not in get_args(Outcome):
            return f"outcome {str(self.outcome)[:40]!r} is none of {', '.join(get_args(Outcome))}"
        if not _is_config(self.config):
            return "the config is not a small object of numbers and short texts"
        if not isinstance(self.reason, str) or not is_scalar(self.reason):
            return "the reason is not a short text"
        if self.outcome in ("failed", "claimed"):
            timeless = self.median_us is None and self.spread_us is None
            return None if timeless else f"what {_WITHOUT_TIME[self.outcome]} has no time"
        if not (_is_time(self.median_us) and _is_time(self.spread_us)):
            return "a time is not a finite number of at least 0 us"
        return None if self.median_us else "a time of 0 us was not measured"

    @property
    def text(self) -> str:
        """The config's canonical text: equal configs have equal texts."""
        return canonical(self.config).decode()


@dataclass(frozen=True, kw_only=True)
class Record:
    """All measurements of one key in one environment, the fastest first, then what others claim.

    environment: its hash. baseline_us: the time of the default config. date: UTC, ISO 8601, of the last measurement.
    tools: versions by name. `signature` and `signer` are hexadecimal, empty where nobody signed.
    Raises InputError where no config was timed, or for what cannot be stored.
    """

    key: Key
    environment: str
    measured: tuple[Measurement, ...]
    baseline_us: float | None
    date: str
    tools: Mapping[str, str]
    signature: str = ""
    signer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured", tuple(sorted(_distinct(self.measured), key=_place)))
        if problem := self._why_impossible():
            raise InputError(problem, where=f"record {self.key.hash}")

    def _why_impossible(self) -> str | None:
        if not self.measured or self.measured[0].outcome not in ("timed", "claimed"):
            return "no config was timed"
        if len(self.measured) > MAX_MEASURED:
            return f"{len(self.measured)} configs are more than {MAX_MEASURED}"
        if self.baseline_us is not None and not (_is_time(self.baseline_us) and self.baseline_us):
            return "the baseline's time is not a finite number above 0 us"
        if not _is_date(self.date):
            return "the date is not UTC in ISO 8601"
        tools = isinstance(self.tools, Mapping) and len(self.tools) <= MAX_FIELDS
        if not tools or not all(
            isinstance(x, str) and is_scalar(x) for pair in self.tools.items() for x in pair
        ):
            return "the tools are not versions by name"
        return None

    @property
    def best(self) -> Measurement:
        return self.measured[0]

    def unsigned(self) -> Record:
        return replace(self, signature="", signer="")


def now() -> str:
    """The date of a record."""
    return datetime.now(timezone.utc).strftime(DATE_FORMAT)


def merge(one: Record, other: Record) -> Record:
    """Every config of both, unsigned. The order of merging does not matter, nor does merging twice.

    Of two findings on one config a failure counts before a time, a full time before a stopped one, that before a
    claim, and then the smaller: what disturbs a measurement only adds to it.
    Raises InputError for records of different keys.
    """
    if (one.key, one.environment) != (other.key, other.environment):
        raise InputError("records of different keys do not merge", where=f"record {one.key.hash}")
    baselines = [time for time in (one.baseline_us, other.baseline_us) if time is not None]
    last = max(one, other, key=lambda record: (record.date, canonical(record.tools)))
    return Record(
        key=one.key,
        environment=one.environment,
        measured=_fitting(one.measured + other.measured),
        baseline_us=min(baselines, default=None),
        date=last.date,
        tools=last.tools,
    )


def _fitting(measured: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """As many as a record holds, the fastest."""
    return tuple(sorted(_distinct(measured), key=_place)[:MAX_MEASURED])


def _distinct(measured: Iterable[Measurement]) -> list[Measurement]:
    found: dict[str, Measurement] = {}
    for item in measured:
        text = item.text
        found[text] = min(found.get(text, item), item, key=_preference)
    return list(found.values())


def _preference(item: Measurement) -> tuple[Any, ...]:
    return _TRUST[item.outcome], item.median_us or 0.0, item.spread_us or 0.0, item.reason


def _place(item: Measurement) -> tuple[Any, ...]:
    order = get_args(Outcome).index(item.outcome)
    return order, item.median_us or 0.0, item.text


def _is_config(value: Any) -> bool:
    if not isinstance(value, Mapping) or not 0 < len(value) <= MAX_FIELDS:
        return False
    return all(
        isinstance(name, str)
        and is_scalar(name)
        and (is_scalar(item) or (isinstance(item, Mapping) and _is_flat(item)))
        for name, item in value.items()
    )


def _is_flat(value: Mapping[Any, Any]) -> bool:
    return len(value) <= MAX_FIELDS and all(
        isinstance(name, str) and is_scalar(name) and is_scalar(item) for name, item in value.items()
    )


def _is_time(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and 0 <= value <= MAX_INTEGER


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).strftime(DATE_FORMAT) == value
    except ValueError:
        return False
