"""Signatures: what counts where they are asked for, and what nobody may do to signed entries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cache_samples import ENVIRONMENT, cache, key, measured, record

from moecc.autotune.cache_settings import CacheSettings, read_settings
from moecc.autotune.entry import dump_entry
from moecc.autotune.remotes.folder import Folder
from moecc.autotune.sharing import entry_name, read_record
from moecc.autotune.signing import Signer, generate_key, read_trusted, why_untrusted
from moecc.errors import InputError, MoeccError

NAME = entry_name(ENVIRONMENT.hash, key(16).hash)


@pytest.fixture
def alice(tmp_path: Path) -> Signer:
    generate_key(tmp_path / "alice.key")
    return Signer(tmp_path / "alice.key")


@pytest.fixture
def mallory(tmp_path: Path) -> Signer:
    generate_key(tmp_path / "mallory.key")
    return Signer(tmp_path / "mallory.key")


def test_a_signature_is_over_everything_in_a_record(alice: Signer) -> None:
    signed = alice.sign(record())
    trusted = {alice.public}
    assert why_untrusted(signed, trusted) is None
    assert why_untrusted(read_record(NAME, dump_entry(signed), None), trusted) is None
    changes = (
        {"measured": (measured(16, 9.0),)},
        {"baseline_us": 21.0},
        {"date": "2026-01-02T03:04:06+00:00"},
        {"tools": {}},
        {"environment": "0" * 32},
        {"key": key(32)},
        {"signature": "00" * 64},
        {"signature": "no hex"},
    )
    for change in changes:
        assert why_untrusted(replace(signed, **change), trusted) == "its signature is wrong", change
    assert why_untrusted(record(), trusted) == "it is not signed"
    assert why_untrusted(signed, {"11" * 32}) == "its signer is not trusted"


def test_only_entries_of_trusted_signers_come_from_a_remote(
    tmp_path: Path, alice: Signer, mallory: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    shared = Folder(tmp_path / "shared")
    for tokens, one in ((16, alice.sign(record(16))), (32, record(32)), (64, mallory.sign(record(64)))):
        assert shared.write(entry_name(ENVIRONMENT.hash, key(tokens).hash), dump_entry(one), None)
    reader = cache(tmp_path / "reader", f"file://{shared.root}", trusted=frozenset({alice.public}))
    assert reader.get(key(16)) == alice.sign(record(16))
    assert reader.get(key(32)) is None
    assert reader.get(key(64)) is None
    messages = [entry.getMessage() for entry in caplog.records]
    assert [message.rpartition(": ")[2] for message in messages] == [
        "it is not signed",
        "its signer is not trusted",
    ]
    again = cache(tmp_path / "reader", trusted=frozenset({alice.public}))
    assert again.get(key(16)) == alice.sign(record(16))


def test_a_signer_merges_with_nothing_that_it_does_not_trust(
    tmp_path: Path, alice: Signer, mallory: Signer
) -> None:
    shared = Folder(tmp_path / "shared")
    assert shared.write(NAME, dump_entry(mallory.sign(record(16, measured(64, 0.001)))), None)
    writer = cache(tmp_path / "alice", f"file://{shared.root}?write=1", signing_key=tmp_path / "alice.key")
    writer.put(record())
    blob = shared.read(NAME)
    assert blob is not None
    assert read_record(NAME, blob.data, {alice.public}) == alice.sign(record())


def test_two_signers_who_trust_each_other_add_up(tmp_path: Path, alice: Signer, mallory: Signer) -> None:
    both = frozenset({alice.public, mallory.public})
    for name, block in (("alice", 16), ("mallory", 32)):
        one = cache(
            tmp_path / name,
            f"file://{tmp_path}/shared?write=1",
            trusted=both,
            signing_key=tmp_path / f"{name}.key",
        )
        one.put(record(16, measured(block, 10.0)))
    found = cache(tmp_path / "reader", f"file://{tmp_path}/shared", trusted=both).get(key(16))
    assert found is not None
    assert len(found.measured) == 2
    assert found.signer == mallory.public


def test_no_unsigned_record_replaces_a_signed_one(
    tmp_path: Path, alice: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    shared = Folder(tmp_path / "shared")
    signed = dump_entry(alice.sign(record()))
    assert shared.write(NAME, signed, None)
    writer = cache(tmp_path / "anyone", f"file://{shared.root}?write=1")
    writer.put(record(16, measured(64, 1.0)))
    blob = shared.read(NAME)
    assert blob is not None
    assert blob.data == signed
    assert "an unsigned record does not replace it" in caplog.text
    assert cache(tmp_path / "anyone").get(key(16)) == record(16, measured(64, 1.0))


def test_writing_unsigned_where_signatures_count_is_an_error(tmp_path: Path) -> None:
    settings = CacheSettings(
        folder=tmp_path, remote=f"file://{tmp_path}/shared?write=1", trusted=frozenset({"00" * 32})
    )
    with pytest.raises(InputError, match="hint: set MOECC_CACHE_SIGNING_KEY"):
        settings.open_remote()


def test_keys_are_kept_from_others_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    public = generate_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Signer(path).public == public
    with pytest.raises(MoeccError, match="File exists"):
        generate_key(path)
    path.write_text("short")
    with pytest.raises(InputError, match="holds no private key"):
        Signer(path)


def test_trusted_keys_are_apart_by_commas_or_spaces() -> None:
    one, two = "0A" * 32, "0b" * 32
    assert read_trusted(f"{one}, {two}") == {one.lower(), two}
    assert read_settings({"MOECC_CACHE_TRUSTED": two}).trusted == {two}
    with pytest.raises(InputError, match="'abc' is no public key"):
        read_trusted("abc")
