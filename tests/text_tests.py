"""Runs the `// RUN:` lines of .moe files in this process: `[not ]moecc ARGS [2>&1] | filecheck %s`."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser
from typer.testing import CliRunner

from moecc.cli import app
from moecc.errors import MoeccError

_RUN = re.compile(
    r"// RUN: (?P<fails>not )?moecc (?P<args>.*?)(?P<errors> 2>&1)? \| filecheck %s$", re.MULTILINE
)


def text_tests(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.moe"))


def check_text_test(path: Path) -> None:
    """Every RUN line succeeds, or fails with exit code 2 where it says `not`, and its output matches the CHECK lines."""
    runs = list(_RUN.finditer(path.read_text(encoding="utf-8")))
    assert runs, f"{path.name} has no RUN line"
    for run in runs:
        arguments = shlex.split(run["args"].replace("%s", str(path)))
        output, code = _moecc(arguments)
        assert code == (2 if run["fails"] else 0), output
        _filecheck(output.replace(str(path), path.name), path)


def _moecc(arguments: list[str]) -> tuple[str, int]:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, MoeccError):
        return f"error: {result.exception}\n", result.exception.exit_code
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output, result.exit_code


def _filecheck(output: str, path: Path) -> None:
    options = Options(match_filename=str(path))
    complaint = io.StringIO()
    matcher = Matcher(options, FInput("output", output), Parser.from_opts(options))
    matcher.stderr = complaint
    with contextlib.redirect_stderr(complaint):
        code = matcher.run()
    assert code == 0, f"{complaint.getvalue()}\n--- output ---\n{output}"
