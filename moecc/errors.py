"""Errors that a user can act on: one line that says where, what, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """A place in a file that a user wrote; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class MoeccError(Exception):
    """Work that failed although its input was right. The command line exits with `exit_code`.

    The message is one line: `where: what; hint: how to mend it`.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: Location | str | None = None, hint: str | None = None) -> None:
        self.message, self.where, self.hint = message, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where is not None else ""
        suffix = f"; hint: {self.hint}" if self.hint else ""
        return " ".join(f"{prefix}{self.message}{suffix}".split())


class InputError(MoeccError):
    """The input is wrong: a file, a flag, an IR text, a trace."""

    exit_code = 2
