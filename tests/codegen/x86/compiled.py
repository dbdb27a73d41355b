"""Kernels compiled and run in a process of their own: the one of the tests may interpret them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Packed = tuple[str, tuple[int, ...], bytes]


class KernelError(Exception):
    """What the other process raised, as text that starts with the name of its class."""


@dataclass(frozen=True)
class Launch:
    """Tensors after the launch, in the order of the arguments, and what was printed."""

    tensors: list[torch.Tensor]
    printed: str


def _pack(item: object) -> object:
    if not isinstance(item, torch.Tensor):
        return item
    contiguous = item.contiguous()
    return str(item.dtype), tuple(item.shape), contiguous.flatten().view(torch.uint8).numpy().tobytes()


def _unpack(packed: Packed) -> torch.Tensor:
    dtype, shape, data = packed
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape).clone()


def _run(
    module: str,
    kernel: str,
    level: str,
    arguments: Sequence[Any],
    grid: tuple[int, ...],
    constants: dict[str, Any],
) -> tuple[list[object], str] | str:
    """In the other process; errors as text, because not all can be sent."""
    from moecc.codegen.x86 import activated

    items = [_unpack(item) if isinstance(item, tuple) else item for item in arguments]
    output = io.StringIO()
    try:
        with activated(level), contextlib.redirect_stdout(output):
            getattr(importlib.import_module(module), kernel)[grid](*items, **constants)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [_pack(item) for item in items if isinstance(item, torch.Tensor)], output.getvalue()


class Process:
    """Runs kernels of one module, which is on the path; a new process is started where one has died."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._pool = self._start()

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __call__(
        self, kernel: str, level: str, *arguments: object, grid: tuple[int, ...] = (1,), **constants: object
    ) -> Launch:
        packed = [_pack(item) for item in arguments]
        try:
            done = self._pool.submit(_run, self._module, kernel, level, packed, grid, constants).result()
        except BrokenProcessPool:
            self._pool = self._start()
            raise
        if isinstance(done, str):
            raise KernelError(done)
        tensors, printed = done
        return Launch([_unpack(item) for item in tensors], printed)  # type: ignore[arg-type]

    def close(self) -> None:
        self._pool.shutdown()


@contextlib.contextmanager
def process(module: str, cache: Path) -> Iterator[Process]:
    """For the length of a `with`; what it compiles is kept in `cache`."""
    changed = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        started = Process(module)
        started._pool.submit(os.getpid).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    try:
        yield started
    finally:
        started.close()
