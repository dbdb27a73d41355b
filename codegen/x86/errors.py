"""What this backend says when it cannot compile a kernel."""

from __future__ import annotations


class UnsupportedError(Exception):
    """A kernel uses what is not supported here. The location is added where the op is known."""

    def __init__(self, what: str, *, hint: str = "", where: str = "") -> None:
        self.what, self.hint, self.where = what, hint, where
        super().__init__(what, hint, where)

    def at(self, where: str) -> UnsupportedError:
        """The same with a location, unless it has one."""
        return self if self.where else UnsupportedError(self.what, hint=self.hint, where=where)

    def __str__(self) -> str:
        text = f"{self.where}: " if self.where else ""
        text += f"x86: {self.what} is not supported"
        return text + (f"; hint: {self.hint}" if self.hint else "")
