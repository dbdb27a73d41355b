"""Identities, records, merging, and 1,000 entries that nobody should trust."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from cache_samples import ENVIRONMENT, KEY, cache, entries, key, measured, record
from hypothesis import given
from hypothesis import strategies as st

from moecc.autotune.canonical import canonical, parse
from moecc.autotune.entry import MAX_ENTRY_BYTES, EntryError, dump_entry, load_entry, within_space
from moecc.autotune.key import Environment, Key, environment_of, key_of, layer_key
from moecc.autotune.record import Measurement, Record, merge
from moecc.codegen.config import LayerShape
from moecc.errors import InputError
from moecc.ir.semantics import Activation, Router


def load(data: bytes) -> Record:
    return load_entry(data, environment=ENVIRONMENT.hash, key_hash=key(16).hash)


@pytest.mark.parametrize("identity", [ENVIRONMENT, KEY], ids=["environment", "key"])
def test_every_field_is_in_the_hash(identity: Environment | Key) -> None:
    others: dict[str, Any] = {"int": 3, "str": "other", "tuple[str, ...]": ("other",)}
    hashes = {identity.hash}
    for item in fields(identity):
        hashes.add(replace(identity, **{item.name: others.get(str(item.type), {"other": 1})}).hash)
    assert len(hashes) == 1 + len(fields(identity))


@pytest.mark.parametrize(
    "change",
    [
        {"device": ""},
        {"cores": 0},
        {"cores": True},
        {"cores": 1.0},
        {"driver": None},
        {"features": ["tma"]},
        {"features": (1,)},
        {"triton": "x" * 513},
        {"arch": "sm\n90"},
    ],
)
def test_an_environment_that_is_not_known_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="identifies nothing"):
        replace(ENVIRONMENT, **change)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), 1 << 60, {1: 2}, "\n", {"a": {"b": b""}}]
)
def test_what_has_no_text_has_no_hash(value: object) -> None:
    with pytest.raises(InputError, match="has no canonical text"):
        canonical({"value": value})


def test_identities_come_back_equal_from_json() -> None:
    assert environment_of(parse(canonical(asdict(ENVIRONMENT)))) == ENVIRONMENT
    assert key_of(parse(canonical(asdict(KEY)))) == KEY
    assert hash(key_of(parse(canonical(asdict(KEY))))) == hash(KEY)


def test_the_key_of_a_layer_changes_with_every_field_of_its_shape() -> None:
    shape = LayerShape(tokens=16, hidden=2048, intermediate=768, experts=128, top_k=8)
    changes: dict[str, Any] = {
        "slots": 16,
        "received": 64,
        "dtype": "float16",
        "router": Router(normalize=True),
        "activation": Activation(kind="gelu_glu"),
        "has_router_bias": True,
        "has_expert_bias": True,
    }
    keys = {layer_key(shape, op="experts", kernel="moecc", routing="balanced")}
    for item in fields(shape):
        other = replace(shape, **{item.name: changes.get(item.name, getattr(shape, item.name) or 0) or 2})
        if item.name not in changes:
            other = replace(shape, **{item.name: (getattr(shape, item.name) or 1) * 2})
        keys.add(layer_key(other, op="experts", kernel="moecc", routing="balanced"))
    assert len(keys) == 1 + len(fields(shape))


def test_an_entry_comes_back_equal() -> None:
    one = record(16, measured(16, 10.0), measured(32, 9.0, outcome="stopped"), failed(64))
    assert load(dump_entry(one)) == one
    assert one.best.median_us == 10.0
    assert dump_entry(load(dump_entry(one))) == dump_entry(one)


def failed(block_m: int) -> Measurement:
    config = {"gate_up": {"block_m": block_m, "num_warps": 4}, "split": 1}
    return Measurement(config=config, outcome="failed", reason="wrong by 0.3")


@st.composite
def records(draw: st.DrawFn) -> Record:
    blocks = draw(st.lists(st.sampled_from([16, 32, 64, 128]), max_size=6))
    some = [
        failed(block)
        if draw(st.booleans())
        else measured(
            block, float(draw(st.integers(1, 4))), outcome=draw(st.sampled_from(["timed", "stopped"]))
        )
        for block in blocks
    ]
    one = record(16, measured(256, float(draw(st.integers(1, 4)))), *some)
    baseline = draw(st.sampled_from([None, 7.0, 9.0]))
    return replace(one, baseline_us=baseline, date=f"2026-01-0{draw(st.integers(1, 3))}T00:00:00+00:00")


@given(records(), records(), records())
def test_merging_loses_nothing_in_any_order(one: Record, two: Record, three: Record) -> None:
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    assert merge(one, one) == one
    texts = {item.text for item in one.measured + two.measured}
    assert {item.text for item in merge(one, two).measured} == texts


def test_of_two_findings_on_one_config_a_failure_counts_most() -> None:
    one = record(16, measured(16, 10.0), measured(32, 8.0))
    two = record(16, measured(16, 9.0), failed(32))
    merged = merge(one, two)
    assert merged.best == measured(16, 9.0)
    assert merged.measured[1] == failed(32)


def test_configs_outside_the_space_are_left_out() -> None:
    one = record(16, measured(16, 10.0), measured(32, 9.0))

    def why_invalid(_: Key, config: Any) -> str | None:
        return "too many rows" if config["gate_up"]["block_m"] > 16 else None

    inside, refused = within_space(one, why_invalid)
    assert inside is not None
    assert (inside.measured, refused) == ((measured(16, 10.0),), 1)
    assert within_space(one, lambda key, config: config["absent"]) == (None, 2)


def test_no_record_without_a_time() -> None:
    with pytest.raises(InputError, match="no config was timed"):
        record(16, failed(16))
    for wrong in ({"median_us": 0.0}, {"median_us": float("nan")}, {"spread_us": -1.0}, {"median_us": None}):
        with pytest.raises(InputError, match="measurement: a"):
            replace(measured(16, 1.0), **wrong)


HOSTILE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe{}",
    b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04exit\x85R.",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"schema":"moecc.autotune/1","schema":"moecc.autotune/1"}',
    b"1" * 100_000,
    b'{"schema":' + b"9" * 5000 + b"}",
    b" " * (MAX_ENTRY_BYTES + 1),
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_bytes_are_no_entry(data: bytes) -> None:
    with pytest.raises(EntryError) as error:
        load(data)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


REPLACEMENTS: list[Any] = [
    None, True, -1, 0, 1e308, 1 << 70, "", "x" * 600, "\x1b[2J\n", [], {}, [[[]]], {"__class__": "os"}, "NaN", 7.5,
]  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, index) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, index) for index, _ in items]
    for container, index in list(found):
        found += _places(container[index])
    return found


def _mutated(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        at = rng.randrange(len(data))
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at + 1 :]
    value = json.loads(data)
    container, index = rng.choice(_places(value))
    if kind == 2:
        del container[index]
    elif kind == 3 and isinstance(container, dict):
        container["extra" + str(rng.random())] = container[index]
    else:
        container[index] = rng.choice(REPLACEMENTS)
    return json.dumps(value).encode()


def test_a_thousand_broken_entries_are_misses_or_mean_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed number may still be a valid record of the key, never anything else."""
    whole = record(16, measured(16, 10.0), measured(32, 12.5), failed(64))
    cache(tmp_path).put(whole)
    (path,) = entries(tmp_path)
    data = path.read_bytes()
    rng = random.Random(6)
    misses = 0
    for _ in range(1000):
        path.write_bytes(_mutated(data, rng))
        caplog.clear()
        one = cache(tmp_path)
        found = one.get(whole.key)
        lines = [entry.getMessage() for entry in caplog.records]
        if found is None:
            misses += 1
            assert (one.counts.misses, one.counts.bad) == (1, 1)
            assert len(lines) == 1
            assert lines[0].isprintable()
            assert len(lines[0]) < 500
        else:
            assert not lines
            assert (found.key, found.environment) == (whole.key, whole.environment)
            assert load(dump_entry(found)) == found
    assert misses > 800


def test_entries_of_others_are_misses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).put(record(16))
    (path,) = entries(tmp_path)
    path.rename(path.with_name(f"{key(32).hash}.json"))
    assert cache(tmp_path).get(key(32)) is None
    assert "it belongs to another key" in caplog.text
    elsewhere = replace(ENVIRONMENT, device="other")
    foreign = dump_entry(record(16, environment=elsewhere))
    path.write_bytes(foreign)
    assert cache(tmp_path).get(key(16)) is None
    assert "it belongs to another environment" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_a_miss(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).put(record(16))
    (path,) = entries(tmp_path)
    path.unlink()
    make(path)
    assert cache(tmp_path).get(key(16)) is None
    assert len(caplog.records) == 1
