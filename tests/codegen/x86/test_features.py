"""Which level a CPU runs, by its flags."""

from __future__ import annotations

import pytest

from moecc.codegen.x86 import features
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import LEVELS, choose_level, supported_levels


@pytest.mark.parametrize("level", list(LEVELS))
def test_a_cpu_of_a_level_runs_those_below(level: str) -> None:
    names = [name for name in LEVELS if LEVELS[name].flags <= LEVELS[level].flags]
    assert supported_levels(LEVELS[level].flags) == tuple(names)
    assert names[-1] == level
    for flag in LEVELS[level].flags:
        assert level not in supported_levels(LEVELS[level].flags - {flag})


def cpu_of(level: str | None, monkeypatch: pytest.MonkeyPatch, *, tiles: bool = True) -> None:
    flags = LEVELS[level].flags if level else frozenset()
    monkeypatch.setattr(features, "cpu_flags", lambda: flags)
    monkeypatch.setattr(features, "amx_permitted", lambda: tiles)


@pytest.mark.parametrize("level", list(LEVELS))
def test_the_best_level_is_the_default(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_of(level, monkeypatch)
    assert choose_level() == level
    assert choose_level("avx2") == "avx2"


def test_tiles_need_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_of("amx", monkeypatch, tiles=False)
    assert choose_level() == "avx512"
    with pytest.raises(
        UnsupportedError, match=r"level amx \(the kernel does not permit tiles\).*runs avx2, avx512$"
    ):
        choose_level("amx")


def test_pairs_are_slow_where_tiles_are(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = LEVELS["amx"].flags | LEVELS["avx512bf16"].flags
    monkeypatch.setattr(features, "cpu_flags", lambda: flags)
    monkeypatch.setattr(features, "amx_permitted", lambda: False)
    assert choose_level() == "avx512"
    assert choose_level("avx512bf16") == "avx512bf16"


@pytest.mark.parametrize(
    ("cpu", "asked", "message"),
    [
        (
            "avx2",
            "amx",
            r"level amx \(no amx_bf16, amx_int8, amx_tile, avx512bw.*\) is not supported; hint: this CPU runs avx2$",
        ),
        (
            "avx512",
            "sse",
            r"level sse \(known are avx2, avx512, avx512bf16, amx\) is not supported; hint: this CPU runs avx2, avx512$",
        ),
        (None, None, r"level avx2 \(no avx2, .*\) is not supported; hint: this CPU has no AVX2$"),
    ],
)
def test_a_level_that_the_cpu_lacks(
    cpu: str | None, asked: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_of(cpu, monkeypatch)
    with pytest.raises(UnsupportedError, match=message):
        choose_level(asked)
