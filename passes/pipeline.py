"""The compiler: from the imported model to kernel launches."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.passes.fuse import Fuse
from moecc.passes.lower import Lower
from moecc.passes.manager import Pass
from moecc.passes.normalize import Normalize
from moecc.passes.overlap import Overlap
from moecc.passes.place import Place

PIPELINE: tuple[Pass, ...] = (Normalize(), Place(), Overlap(), Fuse(), Lower())


def passes_named(names: str) -> tuple[Pass, ...]:
    """The passes of a comma-separated list. Raises InputError for a name that is not in PIPELINE."""
    known = {step.name: step for step in PIPELINE}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown pass {name!r}", where="-p", hint=f"passes are {', '.join(known)}")
    return tuple(known[name] for name in wanted)
