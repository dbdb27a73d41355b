"""The command line: results on stdout, progress on stderr; exit 0 done, 1 the work failed, 2 the input is wrong."""

from __future__ import annotations

import os
import sys

import typer

from moecc import __version__
from moecc.cli import bench, cache, compile, doctor, opt, place, predict, run, trace, tune
from moecc.errors import MoeccError

app = typer.Typer(
    name="moecc",
    help="A compiler for Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compile")(compile.compile_command)
app.command("place")(place.place_command)
app.command("opt")(opt.opt_command)
app.command("run")(run.run_command)
app.command("bench")(bench.bench_command)
app.command("predict")(predict.predict_command)
app.command("tune")(tune.tune_command)
app.command("doctor")(doctor.doctor_command)
app.add_typer(trace.app, name="trace")
app.add_typer(cache.app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """A compiler for Mixture-of-Experts models."""


def main() -> None:
    """Entry point: every error is one line on stderr and an exit code."""
    try:
        app()
    except MoeccError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
            sys.exit(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
