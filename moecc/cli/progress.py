"""Progress on stderr: a live line on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class StageProgress:
    """Call it as progress(stage, done, total); total 0 means that nobody can tell how much is left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.stage, self.since = "", time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.live = Progress(*columns, console=self.console, transient=True)
        self.task = self.live.add_task("", total=None)

    def __enter__(self) -> StageProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_stage()
        if self.console.is_terminal:
            self.live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self._finish_stage()
            self.stage, self.since = stage, time.monotonic()
        self.live.update(self.task, description=stage, completed=done, total=total or None)

    def _finish_stage(self) -> None:
        if self.stage:
            seconds = time.monotonic() - self.since
            self.console.print(f"{self.stage:<10} {seconds:6.1f} s", highlight=False)
        self.stage = ""
