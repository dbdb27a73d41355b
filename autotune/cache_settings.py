"""Where this user's cache is and with whom it is shared: from the environment's variables, read when asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moecc.autotune.remotes import Remote, open_remote
from moecc.autotune.signing import Signer, read_trusted
from moecc.errors import InputError

FOLDER, REMOTE, TRUSTED, SIGNING_KEY = (
    "MOECC_CACHE",
    "MOECC_CACHE_REMOTE",
    "MOECC_CACHE_TRUSTED",
    "MOECC_CACHE_SIGNING_KEY",
)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """folder: of the local cache, None where there is no home. remote: its URI, "" for none.
    trusted: public keys; with any, what comes from the remote has to be signed by one of them.
    signing_key: file of the private key that signs what goes to the remote.
    """

    folder: Path | None
    remote: str = ""
    trusted: frozenset[str] = frozenset()
    signing_key: Path | None = None

    def open_remote(self) -> Remote | None:
        """InputError for a remote that would be written what nobody may read: unsigned, where signatures count."""
        if not self.remote:
            return None
        remote = open_remote(self.remote)
        if remote.writable and self.trusted and self.signing_key is None:
            raise InputError(
                f"writing needs a key while {TRUSTED} asks for signatures",
                where=remote.name,
                hint=f"set {SIGNING_KEY}, or leave write=1 out",
            )
        return remote

    def open_signer(self) -> Signer | None:
        return Signer(self.signing_key) if self.signing_key else None


def read_settings(variables: Mapping[str, str] = os.environ) -> CacheSettings:
    """From the four variables above. InputError for trusted keys that are none."""
    key = variables.get(SIGNING_KEY)
    return CacheSettings(
        folder=_folder(variables),
        remote=variables.get(REMOTE, ""),
        trusted=read_trusted(variables.get(TRUSTED, "")),
        signing_key=Path(key) if key else None,
    )


def _folder(variables: Mapping[str, str]) -> Path | None:
    if chosen := variables.get(FOLDER):
        return Path(chosen)
    base = Path(variables.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the specification says to ignore relative ones
        return base / "moecc"
    try:
        return Path.home() / ".cache" / "moecc"
    except RuntimeError:
        return None
