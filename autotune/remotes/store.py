"""What every store does: bytes under names, replaced only where nobody else was faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from moecc.autotune.entry import MAX_ENTRY_BYTES
from moecc.errors import MoeccError

READ_LIMIT = MAX_ENTRY_BYTES + 1
"""Bytes that a store reads of one blob at most: one more than an entry may have, so that it is seen to be too large."""


class StoreError(MoeccError):
    """A store that does not answer, refuses, or has no room."""


@dataclass(frozen=True, kw_only=True)
class Blob:
    """The first READ_LIMIT bytes under a name, and the version that a write may claim to replace."""

    data: bytes
    version: str


class Source(Protocol):
    """Names are relative paths of plain characters, with slashes. Every method raises StoreError, and nothing else."""

    def read(self, name: str) -> Blob | None:
        """What is there, None if nothing is."""

    def names(self, prefix: str) -> Iterator[str]:
        """Every name under a prefix that ends with a slash."""


class Store(Source, Protocol):
    """A source that takes new entries."""

    def write(self, name: str, data: bytes, replaces: str | None) -> bool:
        """Replaces that version (None: nothing may be there) at once. False, and no change, where another is there.

        A store that cannot compare says so in its module, and may then lose the slower of two writes at once.
        """

    def remove(self, name: str) -> None:
        """Nothing happens where nothing is."""
