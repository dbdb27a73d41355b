"""A remote beside work that must not wait for it: slow or down, it costs one timeout in all, one warning, no error."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from moecc.autotune.remotes import Remote
from moecc.autotune.remotes.store import Store

log = logging.getLogger(__name__)
EXPECTED_S = 0.1
"""What a question may take without being counted. All waiting beyond adds up to `timeout_s` at most."""

_Result = TypeVar("_Result")


class PatientRemote:
    """Asks a remote until it fails, or until `timeout_s` of waiting are used up; from then on every answer is None.

    `asked`, `failed`: questions so far.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.asked = self.failed = 0
        self._patience_s = remote.timeout_s
        self._refused = False

    @property
    def given_up(self) -> bool:
        return self._patience_s <= 0

    @property
    def writing(self) -> bool:
        return self.remote.writable and not self._refused and not self.given_up

    def ask(self, question: Callable[[Store], _Result]) -> _Result | None:
        """The answer, None without one. The question runs in a thread, which is left behind where it hangs."""
        answer = self._wait_for(question)
        if answer is None or answer.error is None:
            return answer.value if answer else None
        self._give_up(f"{answer.error}; not asked again by this process")
        return None

    def tell(self, question: Callable[[Store], _Result]) -> _Result | None:
        """The same for one that writes: where that fails, reading goes on. Nothing is done once it failed."""
        answer = self._wait_for(question) if self.writing else None
        if answer is None or answer.error is None:
            return answer.value if answer else None
        self.failed += 1
        self._refused = True
        log.warning("%s: %s; not written again by this process", self.remote.name, answer.error)
        return None

    def _wait_for(self, question: Callable[[Store], _Result]) -> _Answer[_Result] | None:
        if self.given_up:
            return None
        self.asked += 1
        start = time.monotonic()
        answer = _Answer(lambda: question(self.remote.store))
        if not answer.wait(self._patience_s + EXPECTED_S):
            self._give_up(f"no answer within {self.remote.timeout_s:g} s; not asked again by this process")
            return None
        self._patience_s -= max(time.monotonic() - start - EXPECTED_S, 0.0)
        if self.given_up:
            log.warning("%s: too slow; not asked again by this process", self.remote.name)
        return answer

    def _give_up(self, reason: str) -> None:
        self.failed += 1
        self._patience_s = 0.0
        log.warning("%s: %s", self.remote.name, reason)


class _Answer(Generic[_Result]):
    def __init__(self, question: Callable[[], _Result]) -> None:
        self.value: _Result | None = None
        self.error: Exception | None = None
        self._question = question
        self._thread = threading.Thread(target=self._run, daemon=True, name="moecc-cache-remote")
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.value = self._question()
        except Exception as error:  # whatever a client library does, it is not the caller's concern
            self.error = error
