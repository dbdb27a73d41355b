"""Candidates on the device of this machine, each at the risk of another process."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from moecc.autotune.race import CandidateError
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.errors import MoeccError

WORKER = "moecc.autotune.device_worker"
# Importing torch, drawing weights, and the first compilation, on a machine that others use.
START_TIMEOUT_S = 300.0
# One call, or one comparison, takes milliseconds.
CALL_TIMEOUT_S = 20.0


class Worker:
    """A process with a layer. `ask` raises CandidateError where it crashed, hung, or says that something is wrong."""

    def __init__(self, task: Mapping[str, Any], environment: Mapping[str, str], module: str = WORKER) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._ask(dict(task), START_TIMEOUT_S)

    def ask(self, *message: Any, timeout_s: float) -> Any:
        result, problem = self._ask(message, timeout_s)
        if problem:
            raise CandidateError(" ".join(str(problem).split())[:200])
        return result

    def _ask(self, message: Any, timeout_s: float) -> Any:
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout_s):
                self.close()
                raise CandidateError(f"it hung for {timeout_s:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            raise CandidateError(f"its process ended with {self._process.returncode}") from None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


@dataclass(kw_only=True)
class WorkerDevice:
    """A layer on this machine's device; see `race.Device`. One process measures; `compilers` of them compile, before.

    kernels: a folder for Triton's cache; compiled kernels go from one process to the other through it.
    Raises MoeccError where not even the default config runs.
    """

    shape: LayerShape
    target: str
    default: KernelConfigs
    kernels: Path
    shares: tuple[float, ...] = ()
    compilers: int = 2
    call_timeout_s: float = CALL_TIMEOUT_S
    module: str = WORKER
    compiled: int = 0
    _measuring: Worker | None = None
    _idle: SimpleQueue[Worker] = field(default_factory=SimpleQueue)
    _started: list[Worker] = field(default_factory=list)

    def __enter__(self) -> WorkerDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._started:
            if worker.is_alive:
                worker.close()

    def prepare(self, candidates: Sequence[KernelConfigs], timeout_s: float) -> list[str]:
        """Compiles them side by side, then compares one after the other with the default's result."""
        with ThreadPoolExecutor(self.compilers) as pool:
            problems = list(pool.map(lambda configs: self._compile(configs, timeout_s), candidates))
        return [
            problem or self._check(configs) for configs, problem in zip(candidates, problems, strict=True)
        ]

    def time_us(self, configs: KernelConfigs, number: int) -> float:
        return float(self._measurer().ask("time", configs, number, timeout_s=self.call_timeout_s))

    def _compile(self, configs: KernelConfigs, timeout_s: float) -> str:
        worker = None
        try:
            worker = self._idle_compiler() or self._start("compile")
            worker.ask("compile", configs, timeout_s=timeout_s)
            self.compiled += 1
            return ""
        except CandidateError as error:
            return f"compiling: {error}"
        finally:
            if worker is not None and worker.is_alive:
                self._idle.put(worker)

    def _idle_compiler(self) -> Worker | None:
        try:
            return self._idle.get_nowait()
        except Empty:
            return None

    def _check(self, configs: KernelConfigs) -> str:
        try:
            return str(self._measurer().ask("check", configs, timeout_s=self.call_timeout_s))
        except CandidateError as error:
            return str(error)

    def _measurer(self) -> Worker:
        """The process that measures, another one where a candidate ended it."""
        if self._measuring is None or not self._measuring.is_alive:
            try:
                self._measuring = self._start("time")
            except CandidateError as error:
                raise MoeccError(
                    f"the default config does not run: {error}",
                    where=self.target,
                    hint="moecc doctor says what this machine can run",
                ) from None
        return self._measuring

    def _start(self, purpose: str) -> Worker:
        task = {
            "shape": self.shape,
            "target": self.target,
            "default": self.default,
            "device": "cpu" if self.target == "x86" else "cuda",
            "shares": self.shares,
            "purpose": purpose,
        }
        worker = Worker(task, {"TRITON_CACHE_DIR": str(self.kernels)}, self.module)
        self._started.append(worker)
        return worker
