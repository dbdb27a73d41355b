"""Ed25519 signatures of records: who measured, and that nobody changed it since."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from moecc.autotune.entry import signed_bytes
from moecc.autotune.record import Record
from moecc.errors import InputError, MoeccError

_CONTEXT = b"moecc autotune record\n"
_KEY_BYTES = 32


class Signer:
    """Signs with the private key of a file: 64 hexadecimal digits, made by `generate_key`.

    Raises InputError for a file that holds none, MoeccError where `cryptography` is not installed.
    """

    def __init__(self, path: Path) -> None:
        ed25519 = _ed25519()
        try:
            seed = _hex_bytes(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            raise InputError("holds no private key", where=str(path), hint="64 hexadecimal digits") from None
        self._private = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw().hex()

    def sign(self, record: Record) -> Record:
        signature = self._private.sign(_CONTEXT + signed_bytes(record))
        return replace(record, signature=signature.hex(), signer=self.public)


def generate_key(path: Path) -> str:
    """Writes a new private key that only the owner can read; its public key. MoeccError if the file is there."""
    private = _ed25519().Ed25519PrivateKey.generate()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise MoeccError(
            f"cannot be written: {error.strerror}", where=str(path), hint="name a new file"
        ) from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(private.private_bytes_raw().hex() + "\n")
    return str(private.public_key().public_bytes_raw().hex())


def why_untrusted(record: Record, trusted: Collection[str]) -> str | None:
    """Why that record is not signed by one of the public keys (64 hexadecimal digits each), or None if it is."""
    if not record.signature:
        return "it is not signed"
    if record.signer not in trusted:
        return "its signer is not trusted"
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(_hex_bytes(record.signer))
        public.verify(bytes.fromhex(record.signature), _CONTEXT + signed_bytes(record))
    except (InvalidSignature, ValueError):
        return "its signature is wrong"
    return None


def read_trusted(text: str) -> frozenset[str]:
    """Public keys from a setting: apart by commas or spaces. InputError for one that is none."""
    keys = text.lower().replace(",", " ").split()
    for key in keys:
        try:
            _hex_bytes(key)
        except ValueError:
            raise InputError(
                f"{key[:80]!r} is no public key", where="trusted keys", hint="64 hexadecimal digits"
            ) from None
    return frozenset(keys)


def _hex_bytes(text: str) -> bytes:
    data = bytes.fromhex(text.strip())
    if len(data) != _KEY_BYTES:
        raise ValueError(f"{len(data)} bytes")
    return data


def _ed25519() -> ModuleType:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MoeccError(
            "signatures need the package cryptography",
            where="autotune cache",
            hint="pip install 'moecc[sign]'",
        ) from None
    return ed25519
