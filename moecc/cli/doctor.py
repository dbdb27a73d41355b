"""moecc doctor"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what this machine can do."""
    from moecc.doctor import examine

    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<16} {', '.join(value) if isinstance(value, list) else value}")
