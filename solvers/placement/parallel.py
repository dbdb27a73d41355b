"""Layers shared by worker processes where they are independent; each layer's seed and answer stay the same.

A worker is an interpreter of its own (no fork, no guard needed in the caller's main module). It reads tasks from its
standard input, in a thread, and ends when that closes: no worker outlives its parent, however the parent ends.
"""

from __future__ import annotations

import _thread
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any

from moecc.errors import MoeccError
from moecc.solvers.placement.balance import Ints
from moecc.solvers.placement.layers import Work

Phase = Callable[[Work], None]
STOP_S = 5.0
"""Seconds that workers get to hand in their best after an interrupt."""
WORKER = """import sys
sys.path[:] = [path for path in sys.path if path]
from moecc.solvers.placement.parallel import serve
serve()
"""


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    part: list[int]
    done: int = 0
    total: int = 0
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What a phase changed: (experts, device_of) and the bound of each of the part's layers."""

    layers: list[tuple[Ints, Ints]]
    bounds: list[float | None]
    cut: bool
    notes: list[str]


class Team:
    """`workers` processes that run phases on their own layers; with one, phases run in this process.

    As a context it ends its processes on the way out, whatever happened.
    """

    def __init__(self, workers: int) -> None:
        self.size, self.workers = workers, list[_Worker]()
        self.messages: queue.Queue[tuple[int, Any]] = queue.Queue()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.communicate()

    def run(self, work: Work, phase: Phase) -> None:
        """phase(work) on all layers. phase must be a module's function or a partial of one.

        An interrupt is passed on, the workers' best so far is taken over, and it is raised again. Raises MoeccError
        if a worker fails.
        """
        count = min(self.size, len(work.layers))
        if count < 2:
            phase(work)
            return
        for index in range(count):
            if index == len(self.workers):
                self.workers.append(self._hire(index))
            worker = self.workers[index]
            worker.part = list(range(index, len(work.layers), count))
            worker.done, worker.total, worker.finished = 0, 0, False
            self._send(worker, (phase, _part_of(work, worker.part)))
        active = self.workers[:count]
        try:
            while not all(worker.finished for worker in active):
                self._take(work, active, *self.messages.get(timeout=None))
        except KeyboardInterrupt:
            self._interrupt(work, active)
            raise

    def _hire(self, index: int) -> _Worker:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal's Ctrl-C reaches the parent alone, which passes it on.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        threading.Thread(target=self._listen, args=(index, process.stdout), daemon=True).start()
        return _Worker(process=process, part=[])

    def _listen(self, index: int, stream: IO[bytes]) -> None:
        try:
            while True:
                self.messages.put((index, pickle.load(stream)))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self.messages.put((index, None))

    def _send(self, worker: _Worker, message: object) -> None:
        assert worker.process.stdin is not None
        try:
            pickle.dump(message, worker.process.stdin, pickle.HIGHEST_PROTOCOL)
            worker.process.stdin.flush()
        except BrokenPipeError:
            # Its listener reports the end.
            return

    def _take(self, work: Work, active: list[_Worker], index: int, message: Any) -> None:
        worker = self.workers[index]
        if message is None or message[0] == "failed":
            raise MoeccError(
                "a worker process of the placement search failed" + (f":\n{message[1]}" if message else ""),
                where="placement",
                hint="solve with workers=1; if that works, please report it",
            )
        if message[0] == "tick":
            worker.done, worker.total = message[1:]
            if all(other.total for other in active):
                work.tick(sum(w.done for w in active), sum(w.total for w in active))
            return
        worker.finished = True
        _merge(work, worker.part, message[1])

    def _interrupt(self, work: Work, active: list[_Worker]) -> None:
        work.tick = _unseen
        for worker in active:
            if not worker.finished:
                self._send(worker, None)
        try:
            while not all(worker.finished for worker in active):
                self._take(work, active, *self.messages.get(timeout=STOP_S))
        except (queue.Empty, MoeccError):
            # Layers of a worker that does not answer stay as they were.
            return


def _part_of(work: Work, part: list[int]) -> Work:
    """The same work on some layers, which keep their numbers and with them their seeds."""
    workloads = tuple(
        replace(routing, topk_ids=routing.topk_ids[:, part]) for routing in work.problem.workloads
    )
    problem = replace(work.problem, workloads=workloads, workers=1, in_force=None, max_moved_bytes=None)
    return replace(
        work,
        problem=problem,
        layers=[work.layers[index] for index in part],
        caps=work.caps[part],
        bounds=[work.bounds[index] for index in part],
        numbers=[work.numbers[index] for index in part],
        tick=_unseen,
        notes=[],
    )


def _merge(work: Work, part: list[int], done: _Result) -> None:
    for index, (experts, device_of), bound in zip(part, done.layers, done.bounds, strict=True):
        work.layers[index].experts, work.layers[index].device_of = experts, device_of
        work.bounds[index] = bound
    work.clock.cut |= done.cut
    work.notes += [note for note in done.notes if note not in work.notes]


def _unseen(done: int, total: int) -> None:
    """Progress that nobody watches."""


def serve() -> None:
    """A worker: run one task after the other until standard input closes."""
    # Whatever prints must not end up between the messages.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks: queue.Queue[tuple[Phase, Work]] = queue.Queue()
    threading.Thread(target=_hear, args=(tasks,), daemon=True).start()
    while True:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        phase, work = tasks.get()
        work.tick = lambda done, total: _say(out, ("tick", done, total))
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            phase(work)
        except KeyboardInterrupt:
            work.clock.cut = True
        except Exception:
            _say(out, ("failed", traceback.format_exc()))
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        layers = [(layer.experts, layer.device_of) for layer in work.layers]
        _say(out, ("done", _Result(layers=layers, bounds=work.bounds, cut=work.clock.cut, notes=work.notes)))


def _hear(tasks: queue.Queue[tuple[Phase, Work]]) -> None:
    """Tasks go to the queue; None interrupts the one that runs; the end of the stream ends the process."""
    try:
        while True:
            message = pickle.load(sys.stdin.buffer)
            if message is None:
                _thread.interrupt_main()
            else:
                tasks.put(message)
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(0)


def _say(out: IO[bytes], message: object) -> None:
    pickle.dump(message, out, pickle.HIGHEST_PROTOCOL)
    out.flush()
