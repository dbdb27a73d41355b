"""moecc cache"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.errors import InputError, MoeccError

if TYPE_CHECKING:
    from moecc.autotune.cache_settings import CacheSettings
    from moecc.autotune.remotes import Remote
    from moecc.autotune.remotes.folder import Folder
    from moecc.autotune.upkeep import Copied

app = typer.Typer(help="Look at what was tuned, and share it.", no_args_is_help=True)

FolderOption = Annotated[
    Path | None, typer.Option("--cache", help="The local folder, instead of MOECC_CACHE.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RemoteArgument = Annotated[
    str,
    typer.Argument(metavar="[URI]", help="The remote, instead of MOECC_CACHE_REMOTE.", show_default=False),
]
FormatOption = Annotated[
    str,
    typer.Option("--format", help="bundle: one JSON file; folder: for a web server or git; vllm, sglang."),
]


@app.command("ls")
def list_command(cache: FolderOption = None, as_json: JsonOption = False) -> None:
    """One line for each key: what was tuned where, the best time, and how many configs were measured."""
    from moecc.autotune.sharing import environments, scan
    from moecc.cli.cache_tables import entry_row, print_entries

    folder = _local(cache)
    known, found = environments(folder), list(scan(folder))
    rows = [entry_row(item.record, known.get(item.environment)) for item in found if item.record]
    bad = {item.name: item.problem for item in found if item.record is None}
    if as_json:
        typer.echo(json.dumps({"entries": rows, "bad": bad}, indent=1))
        return
    print_entries(rows)
    if bad:
        typer.echo(f"note: {len(bad)} entries are bad, see moecc cache verify", err=True)


@app.command("show")
def show_command(
    entry: Annotated[
        str, typer.Argument(help="The key's hash as ls prints it, or its beginning.", show_default=False)
    ],
    cache: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """All of one record: key, environment, every measured config."""
    from dataclasses import asdict

    from moecc.autotune.sharing import environments, scan
    from moecc.cli.cache_tables import print_record

    folder = _local(cache)
    matches = [item.record for item in scan(folder) if item.record and item.record.key.hash.startswith(entry)]
    if len(matches) != 1:
        problem = f"{len(matches)} entries begin so" if matches else "there is no such entry"
        raise InputError(problem, where=f"entry {entry!r}", hint="moecc cache ls prints them")
    environment = environments(folder).get(matches[0].environment)
    if as_json:
        facts = None if environment is None or isinstance(environment, str) else asdict(environment)
        typer.echo(json.dumps({"environment": facts, "record": asdict(matches[0])}, indent=1))
        return
    print_record(matches[0], environment)


@app.command("stats")
def stats_command(cache: FolderOption = None, as_json: JsonOption = False) -> None:
    """For each environment: entries, configs measured, bytes, how much faster than the default."""
    from moecc.autotune.sharing import environments, scan
    from moecc.cli.cache_tables import print_stats, stats_rows

    folder = _local(cache)
    rows = stats_rows(environments(folder), list(scan(folder)))
    if as_json:
        typer.echo(json.dumps({"folder": str(folder.root), "environments": rows}, indent=1))
        return
    print_stats(folder.root, rows)


@app.command("verify")
def verify_command(
    cache: FolderOption = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="Every entry has to be signed by a key of MOECC_CACHE_TRUSTED.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every file; exit 1 if one is bad."""
    from moecc.autotune.upkeep import check

    trusted = _settings(cache).trusted if signed else None
    if signed and not trusted:
        raise InputError("there are no trusted keys", where="--signed", hint="set MOECC_CACHE_TRUSTED")
    good, problems = check(_local(cache), trusted)
    if as_json:
        typer.echo(json.dumps({"good": good, "problems": problems}, indent=1))
    else:
        for name, problem in problems.items():
            typer.echo(f"{name}: {problem}")
        typer.echo(f"{good} entries are good, {len(problems)} files are bad")
    if problems:
        raise typer.Exit(1)


@app.command("push")
def push_command(uri: RemoteArgument = "", cache: FolderOption = None, as_json: JsonOption = False) -> None:
    """Merge all local entries into a remote, which has to be writable: URI?write=1."""
    from moecc.autotune.upkeep import copy_all

    settings = _settings(cache, uri)
    remote = _remote(settings)
    if not remote.writable:
        raise InputError("is read-only", where=remote.name, hint=f"moecc cache push '{remote.name}?write=1'")
    signer = settings.open_signer()
    trusted = settings.trusted or None
    if signer is not None:
        trusted = settings.trusted | {signer.public}
    copied = copy_all(_local(cache), remote.store, signer=signer, trusted_target=trusted, keep_signed=True)
    _print_copied(copied, f"pushed to {remote.name}", as_json)


@app.command("pull")
def pull_command(uri: RemoteArgument = "", cache: FolderOption = None, as_json: JsonOption = False) -> None:
    """Merge all entries of a remote into the local cache; with MOECC_CACHE_TRUSTED only those that it signed."""
    from moecc.autotune.upkeep import copy_all

    settings = _settings(cache, uri)
    remote = _remote(settings)
    copied = copy_all(remote.store, _local(cache), trusted_source=settings.trusted or None)
    _print_copied(copied, f"pulled from {remote.name}", as_json)


@app.command("keygen")
def keygen_command(
    path: Annotated[Path, typer.Argument(help="The private key to write.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Make a key that signs; prints the public key, which others trust."""
    from moecc.autotune.signing import generate_key

    public = generate_key(path)
    typer.echo(json.dumps({"public": public}) if as_json else public)


@app.command("gc")
def gc_command(
    cache: FolderOption = None,
    older_than_days: Annotated[
        float | None, typer.Option(help="Also entries that were last measured so long ago.", min=0)
    ] = None,
    max_mb: Annotated[
        float | None, typer.Option(help="Also the oldest entries beyond this size, 1e6 bytes.", min=0)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, say what would be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove broken entries, what killed writers left behind, and on demand what is old or too much."""
    from dataclasses import asdict

    from moecc.autotune.upkeep import clean

    max_bytes = None if max_mb is None else int(max_mb * 1e6)
    removed = clean(_local(cache), older_than_days=older_than_days, max_bytes=max_bytes, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(removed)}, indent=1))
        return
    parts = ", ".join(
        f"{len(names)} {reason.replace('_', ' ')}"
        for reason, names in asdict(removed).items()
        if reason != "bytes"
    )
    typer.echo(
        f"{'would remove' if dry_run else 'removed'}: {parts}; {removed.bytes / 1e6:.2f} MB of entries"
    )


@app.command("export")
def export_command(
    path: Annotated[Path, typer.Argument(help="What to write.", show_default=False)],
    format_: FormatOption = "bundle",
    cache: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the cache in a form that travels."""
    from moecc.autotune.formats import find_format

    notes = find_format(format_).write(_local(cache), path)
    _print_notes(notes, f"{path} written", as_json)


@app.command("import")
def import_command(
    path: Annotated[Path, typer.Argument(help="What export, vLLM or SGLang wrote.", show_default=False)],
    format_: FormatOption = "bundle",
    cache: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an exported form into the local cache."""
    from moecc.autotune.formats import find_format

    notes = find_format(format_).read(path, _local(cache))
    _print_notes(notes, f"{path} merged", as_json)


def _settings(folder: Path | None, uri: str = "") -> CacheSettings:
    from dataclasses import replace

    from moecc.autotune.cache_settings import read_settings

    settings = read_settings()
    return replace(settings, folder=folder or settings.folder, remote=uri or settings.remote)


def _local(folder: Path | None) -> Folder:
    from moecc.autotune.remotes.folder import Folder

    root = _settings(folder).folder
    if root is None:
        raise MoeccError(
            "there is no home folder", where="autotune cache", hint="give --cache, or set MOECC_CACHE"
        )
    return Folder(root)


def _remote(settings: CacheSettings) -> Remote:
    remote = settings.open_remote()
    if remote is None:
        raise InputError(
            "there is no remote", where="moecc cache", hint="give a URI, or set MOECC_CACHE_REMOTE"
        )
    return remote


def _print_copied(copied: Copied, what: str, as_json: bool) -> None:
    if as_json:
        facts = {"written": copied.written, "unchanged": copied.unchanged, "refused": copied.refused}
        typer.echo(json.dumps(facts, indent=1))
        return
    for line in copied.refused:
        typer.echo(f"refused: {line}", err=True)
    typer.echo(
        f"{what}: {copied.written} written, {copied.unchanged} unchanged, {len(copied.refused)} refused"
    )


def _print_notes(notes: list[str], what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"notes": notes}, indent=1))
        return
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(what)
