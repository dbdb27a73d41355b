"""Reading device specs: shipped ones by name, a user's own by path, both through one schema."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moecc.errors import InputError
from moecc.hardware.spec import DTYPE_BYTES, EXCHANGES, MODELS, DeviceSpec, Link, Roofline

_DATA = resources.files("moecc.hardware") / "data"


def device_names() -> list[str]:
    """Names of the devices whose specs are shipped, sorted."""
    return sorted(entry.name[:-5] for entry in _DATA.iterdir() if entry.name.endswith(".yaml"))


@cache
def load_device(name: str) -> DeviceSpec:
    """The shipped device `name`, or the device described by the YAML file at the path `name`.

    Raises InputError for an unknown name (with the closest known one), and for a file that does not follow
    the schema (naming the file and the key).
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return parse_device(Path(name).read_text(encoding="utf-8"), where=name)
        except (OSError, UnicodeDecodeError) as error:
            hint = f"give a device's YAML file, or one of {', '.join(device_names())}"
            raise InputError(f"cannot read the device file: {error}", where=name, hint=hint) from error
    known = device_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        guess = f"did you mean {close[0]!r}? " if close else ""
        hint = f"{guess}known: {', '.join(known)}; or the path of a .yaml file"
        raise InputError(f"unknown device {name!r}", hint=hint)
    return parse_device((_DATA / f"{name}.yaml").read_text(encoding="utf-8"), where=f"{name}.yaml")


def parse_device(text: str, *, where: str) -> DeviceSpec:
    """A device from YAML text; `where` names the text in errors."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"not YAML: {error}", where=where, hint="see the shipped devices") from error
    root = _Section(data, where, "", {})
    sources = root.section("sources")
    names = {key: sources.text(key) for key in list(sources.data)}
    root.sources = names
    device = DeviceSpec(
        name=root.text("name"),
        description=root.text("description"),
        vendor=root.text("vendor"),
        target=root.text("target"),
        calibrated=root.flag("calibrated"),
        cores=int(root.number("cores", low=1)),
        warp_size=int(root.number("warp_size", low=1)),
        shared_memory_kb=root.number("shared_memory_kb"),
        registers_per_core=int(root.number("registers_per_core", low=1)),
        memory_gb=root.number("memory_gb"),
        memory_bandwidth_gb_s=root.number("memory_bandwidth_gb_s"),
        peak_tflops=root.numbers("peak_tflops", DTYPE_BYTES),
        tile_rows=root.number("tile_rows", low=1),
        elementwise_efficiency=root.number("elementwise_efficiency", high=1.5),
        dense=_roofline(root.section("dense")),
        experts=_roofline(root.section("experts")),
        intra_link=_link(root.section("intra_link")),
        inter_link=_link(root.section("inter_link")),
        error_pct=root.numbers("error_pct", MODELS, empty=True),
        sources=names,
    )
    root.close()
    _check_consistent(device, where)
    return device


def _roofline(section: _Section) -> Roofline:
    roofs = Roofline(
        memory_efficiency=section.number("memory_efficiency", high=1.5),
        compute_efficiency=section.numbers("compute_efficiency", DTYPE_BYTES, high=1.5),
        overhead_us=section.number("overhead_us", low=0.0),
    )
    section.close()
    return roofs


def _link(section: _Section) -> Link:
    link = Link(
        technology=section.text("technology"),
        bandwidth_gb_s=section.number("bandwidth_gb_s"),
        alpha_us=section.numbers("alpha_us", EXCHANGES, complete=True, low=0.0),
        efficiency=section.numbers("efficiency", EXCHANGES, complete=True, high=1.5),
    )
    section.close()
    return link


def _check_consistent(device: DeviceSpec, where: str) -> None:
    for name, roofs in (("dense", device.dense), ("experts", device.experts)):
        if set(roofs.compute_efficiency) != set(device.peak_tflops):
            hint = f"give one for each of: {', '.join(device.peak_tflops)}"
            raise InputError(
                f"{name}.compute_efficiency and peak_tflops differ in dtypes", where=where, hint=hint
            )
    if device.calibrated != bool(device.error_pct):
        hint = "a calibrated device states its held-out error, an uncalibrated one has none"
        raise InputError("calibrated and error_pct contradict each other", where=where, hint=hint)


class _Section:
    """A mapping of the file that is taken apart key by key; what is left at the end is unknown."""

    def __init__(self, data: Any, where: str, path: str, sources: Mapping[str, str]) -> None:
        self.where, self.path, self.sources = where, path, sources
        if not isinstance(data, dict):
            raise InputError(f"{path or 'the file'} must be a mapping", where=where)
        self.data = dict(data)

    def fail(self, key: str, what: str, hint: str | None = None) -> InputError:
        return InputError(f"{self.path}{key}: {what}", where=self.where, hint=hint)

    def take(self, key: str) -> Any:
        if key not in self.data:
            raise self.fail(key, "missing")
        return self.data.pop(key)

    def close(self) -> None:
        for key in self.data:
            raise self.fail(str(key), "unknown key")

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(key, "must be a text")
        return " ".join(value.split())

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def section(self, key: str) -> _Section:
        return _Section(self.take(key), self.where, f"{self.path}{key}.", self.sources)

    def number(self, key: str, *, low: float | None = None, high: float = math.inf) -> float:
        """A `{value, source}` pair; without `low` the value must be above zero."""
        pair = self.take(key)
        if not isinstance(pair, dict) or set(pair) != {"value", "source"}:
            raise self.fail(key, "must be {value: number, source: key of `sources`}")
        value, source = pair["value"], pair["source"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.fail(key, "value must be a finite number")
        if value > high or value < (0 if low is None else low) or (low is None and value == 0):
            raise self.fail(key, f"value {value:g} is out of range")
        if source not in self.sources:
            hint = f"known: {', '.join(self.sources)}"
            raise self.fail(key, f"source {source!r} is not in `sources`", hint)
        return float(value)

    def numbers(
        self,
        key: str,
        allowed: Mapping[str, int] | tuple[str, ...],
        *,
        empty: bool = False,
        complete: bool = False,
        low: float | None = None,
        high: float = math.inf,
    ) -> dict[str, float]:
        """A mapping of pairs, its keys among `allowed` (all of them if `complete`, at least one unless `empty`)."""
        section = self.section(key)
        missing = [name for name in allowed if name not in section.data] if complete else []
        unknown = [name for name in section.data if name not in allowed]
        if missing or unknown or not (section.data or empty):
            raise self.fail(key, "wrong keys", f"allowed: {', '.join(allowed)}")
        return {name: section.number(name, low=low, high=high) for name in list(section.data)}
