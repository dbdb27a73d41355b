"""Kernels that this machine has compiled before, found again by what they were compiled from.

They stay in the local folder: unlike records they are code, and nobody else's is run.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moecc.autotune.cache_settings import read_settings
from moecc.autotune.canonical import canonical, digest, parse
from moecc.autotune.environment import compiler_source_hash
from moecc.codegen.aot import CompiledKernel, Job, job_constants
from moecc.codegen.resources import Resources
from moecc.errors import MoeccError
from moecc.files import write_atomic

log = logging.getLogger(__name__)
FOLDER = "kernels/v1"
MAX_BYTES = 1 << 30
"""Of all kernels that are kept; the oldest go first."""

_HARMLESS = {"TRITON_CACHE_DIR", "TRITON_INTERPRET", "TRITON_DEFAULT_BACKEND", "TRITON_DISABLE_LINE_INFO"}


@dataclass(frozen=True)
class Binaries:
    """A folder of kernels, None for none. What goes wrong is a miss, and is logged once where it is the disk."""

    folder: Path | None

    @classmethod
    def of(cls, cache_folder: Path | None) -> Binaries:
        """Those in a cache's folder."""
        return cls(cache_folder / FOLDER if cache_folder else None)

    @classmethod
    def of_user(cls) -> Binaries:
        """Those of this user; none where the settings of the cache are wrong, which whoever looks configs up says."""
        try:
            return cls.of(read_settings().folder)
        except MoeccError:
            return cls(None)

    def get(self, job: Job) -> CompiledKernel | None:
        """The kernel of a job that names one."""
        if self.folder is None:
            return None
        with suppress(OSError, ValueError, TypeError, KeyError):
            path = self.folder / f"{_identity(job)}.json"
            kernel = _load(path.read_bytes())
            os.utime(path)
            return kernel
        return None

    def put(self, job: Job, kernel: CompiledKernel) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{_identity(job)}.json", _dump(kernel))
        except (OSError, MoeccError) as error:
            _say_once(f"compiled kernels are not kept: {error}")

    def prune(self) -> None:
        """Keeps the youngest."""
        if self.folder is None:
            return
        with suppress(OSError):
            states = [(path.stat(), path) for path in self.folder.glob("*.json")]
            total = 0
            for state, path in sorted(states, key=lambda pair: -pair[0].st_mtime):
                total += state.st_size
                if total > MAX_BYTES:
                    path.unlink(missing_ok=True)


def _identity(job: Job) -> str:
    """Of all that the kernel depends on."""
    return digest(
        {
            "sources": _sources(),
            "triton": version("triton"),
            "target": job.target,
            "dtype": job.shape.dtype,
            "constants": job_constants(job),
            "settings": digest({name: os.environ[name] for name in sorted(os.environ) if _matters(name)}),
        }
    )


def _matters(variable: str) -> bool:
    """Whether it may change what the compiler does, such as another ptxas."""
    return variable.startswith(("TRITON_", "MOECC_X86_")) and variable not in _HARMLESS


@cache
def _sources() -> str:
    return compiler_source_hash()


def _dump(kernel: CompiledKernel) -> bytes:
    body: dict[str, Any] = {**asdict(kernel), "assembly": "", "binary": ""}
    parts = {"assembly": kernel.assembly.encode(), "binary": kernel.binary}
    head = canonical(body)
    blobs = {name: base64.b64encode(part).decode() for name, part in parts.items()}
    total = hashlib.sha256(head + parts["assembly"] + parts["binary"]).hexdigest()
    texts = "".join(f',"{name}":"{text}"' for name, text in blobs.items())
    return b'{"head":' + head + f',"sha256":"{total}"{texts}}}'.encode()


def _load(data: bytes) -> CompiledKernel:
    """ValueError, KeyError or TypeError for anything but what `_dump` made."""
    value = parse(data)
    assembly, binary = (base64.b64decode(value[name], validate=True) for name in ("assembly", "binary"))
    head = value["head"]
    if value["sha256"] != hashlib.sha256(canonical(head) + assembly + binary).hexdigest():
        raise ValueError("its hash is not that of its content")
    if set(head) != {item.name for item in fields(CompiledKernel)}:
        raise ValueError("its fields are not those of a kernel")
    resources = Resources(**head["resources"])
    return CompiledKernel(**{**head, "assembly": assembly.decode(), "binary": binary, "resources": resources})


@cache
def _say_once(problem: str) -> None:
    log.warning("%s", problem)
