"""Runs passes in order, verifies the IR after each, and names the pass in every error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from moecc.errors import MoeccError
from moecc.ir.core import Module
from moecc.ir.verifier import verify
from moecc.solvers.routing import Routing


def _silent(message: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What passes may know beside the IR: the workloads' routing, and whom to tell how far they are."""

    workloads: tuple[Routing, ...] = ()
    progress: Callable[[str, int, int], None] = _silent


class Pass(Protocol):
    """IR to IR, in place. A pass leaves the module valid and its docstring states its contract."""

    name: str

    def run(self, module: Module, context: Context) -> None: ...


def run_passes(
    module: Module,
    passes: Sequence[Pass],
    context: Context,
    observe: Callable[[str, Module], None] = lambda name, module: None,
) -> None:
    """Runs the passes on `module` in place; `observe` sees the module after each, verified.

    Raises the pass's own error with `after 'name'` or `in 'name'` in front.
    """
    for step in passes:
        context.progress(step.name, 0, 0)
        with _named(f"in '{step.name}'"):
            step.run(module, context)
        with _named(f"after '{step.name}'"):
            verify(module)
        observe(step.name, module)


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    try:
        yield
    except MoeccError as error:
        raise type(error)(f"{prefix}: {error.message}", where=error.where, hint=error.hint) from error
