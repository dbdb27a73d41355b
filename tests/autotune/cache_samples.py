"""Records to keep, and caches to keep them in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moecc.autotune.cache import Cache
from moecc.autotune.cache_settings import CacheSettings
from moecc.autotune.key import Environment, Key
from moecc.autotune.record import Measurement, Record

ENVIRONMENT = Environment(
    device="NVIDIA H100 80GB HBM3",
    arch="sm_90",
    cores=132,
    features=("tma", "wgmma"),
    driver="570.86.15",
    assembler="ptxas 12.8.93",
    triton="3.7.1",
    kernel_source="0123abcd",
    measurement="medians/1",
)
KEY = Key(
    op="experts",
    kernel="moecc",
    experts=128,
    hidden=2048,
    intermediate=768,
    top_k=8,
    tokens=16,
    dtype="bfloat16",
    weight_dtype="bfloat16",
    quant="none",
    layout="rows",
    activation="silu_glu",
    routing="balanced",
    options={"shared": 0, "has_router_bias": False},
)


def key(tokens: int) -> Key:
    return replace(KEY, tokens=tokens)


def measured(block_m: int, median_us: float, **others: Any) -> Measurement:
    config = {"gate_up": {"block_m": block_m, "num_warps": 4}, "split": 1}
    return Measurement(config=config, median_us=median_us, spread_us=0.25, **others)


def record(tokens: int = 16, *measurements: Measurement, environment: Environment = ENVIRONMENT) -> Record:
    return Record(
        key=key(tokens),
        environment=environment.hash,
        measured=measurements or (measured(16, 10.0), measured(32, 12.5)),
        baseline_us=20.0,
        date="2026-01-02T03:04:05+00:00",
        tools={"triton": "3.7.1"},
    )


def cache(folder: Path | None, remote: str = "", **settings: Any) -> Cache:
    return Cache(ENVIRONMENT, settings=CacheSettings(folder=folder, remote=remote, **settings))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("v1/*/entries/*.json"))
