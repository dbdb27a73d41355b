"""moecc opt"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moecc.errors import InputError


def opt_command(
    file: Annotated[Path, typer.Argument(help="IR text; - reads standard input.", show_default=False)],
    passes: Annotated[str, typer.Option("-p", "--passes", help="Passes to run, as in normalize,fuse.")] = "",
    trace: Annotated[list[Path] | None, typer.Option(help="A trace for the pass place, repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the IR as a JSON string under 'ir'.")
    ] = False,
) -> None:
    """Read IR, run passes, verify, and print IR."""
    from moecc.frontend.trace import load_trace
    from moecc.ir.parser import parse_module
    from moecc.ir.printer import print_module
    from moecc.ir.verifier import verify
    from moecc.passes.manager import Context, run_passes
    from moecc.passes.pipeline import passes_named

    wanted = passes_named(passes)
    module = parse_module(*_read(file))
    verify(module)
    workloads = tuple(load_trace(path) for path in trace or [])
    run_passes(module, wanted, Context(workloads=workloads))
    text = print_module(module)
    typer.echo(json.dumps({"ir": text}) + "\n" if as_json else text, nl=False)


def _read(file: Path) -> tuple[str, str]:
    """(text, name for locations)"""
    name = "<stdin>" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=name, hint="give a file of IR text"
        ) from None
    try:
        return data.decode("utf-8"), name
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} is not UTF-8", where=name, hint="give a file of IR text"
        ) from None
