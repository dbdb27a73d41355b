"""Files of tuned configs as vLLM and SGLang ship them: name and content, read and written without loss.

    E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128,128].json
    {"1": {"BLOCK_SIZE_M": 16, ...}, "2": ..., "triton_version": "3.5.0"}

E: experts and N: intermediate size of one device. The hidden size and top_k are not said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moecc.autotune.canonical import Scalar, is_scalar, parse
from moecc.autotune.key import MAX_FIELDS
from moecc.autotune.record import Config
from moecc.errors import InputError

VERSION_FIELD = "triton_version"
MAX_FILE_BYTES = 1 << 20

_NAME = re.compile(
    r"E=(?P<experts>[1-9]\d*),N=(?P<intermediate>[1-9]\d*),device_name=(?P<device>[^,/\\\\]+?)"
    r"(?:,dtype=(?P<dtype>[^,/\\\\]+?))?"
    r"(?:,block_shape=\[(?P<block_n>\d+), ?(?P<block_k>\d+)\])?"
    r"(?P<per_channel>,per_channel_quant=True)?"
    r"(?:,backend=(?P<backend>\w+?))?"
    r"(?P<down>_down)?\.json"
)


@dataclass(frozen=True, kw_only=True)
class TunedName:
    """What the name of a file says. device: the driver's name, spaces as underscores.

    dtype: vLLM's word, None for 16-bit weights. down: of the second GEMM only (SGLang tunes it apart).
    """

    experts: int
    intermediate: int
    device: str
    dtype: str | None = None
    block_shape: tuple[int, int] | None = None
    per_channel: bool = False
    backend: str | None = None
    down: bool = False

    def file_name(self, *, space: str = "") -> str:
        """`space` stands after the comma of the block shape: none in vLLM's names, one in SGLang's."""
        parts = [f"E={self.experts},N={self.intermediate},device_name={self.device}"]
        parts += [f"dtype={self.dtype}"] if self.dtype else []
        parts += (
            [f"block_shape=[{self.block_shape[0]},{space}{self.block_shape[1]}]"] if self.block_shape else []
        )
        parts += ["per_channel_quant=True"] if self.per_channel else []
        parts += [f"backend={self.backend}"] if self.backend else []
        return ",".join(parts) + ("_down" if self.down else "") + ".json"


@dataclass(frozen=True, kw_only=True)
class TunedFile:
    """configs: by token count. triton: the version that the file names, if it does."""

    name: TunedName
    configs: Mapping[int, Config]
    triton: str | None = None

    def content(self) -> bytes:
        """The JSON text, in the form of vLLM's own files."""
        named: dict[str, object] = {VERSION_FIELD: self.triton} if self.triton else {}
        named |= {str(tokens): dict(config) for tokens, config in self.configs.items()}
        return json.dumps(named, indent=4).encode() + b"\n"


def parse_name(name: str) -> TunedName | None:
    """None where that is no name of such a file."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    block = (int(found["block_n"]), int(found["block_k"])) if found["block_n"] else None
    return TunedName(
        experts=int(found["experts"]),
        intermediate=int(found["intermediate"]),
        device=found["device"],
        dtype=found["dtype"],
        block_shape=block,
        per_channel=bool(found["per_channel"]),
        backend=found["backend"],
        down=bool(found["down"]),
    )


def parse_file(name: str, data: bytes) -> TunedFile:
    """The file of that name. InputError for what is none, naming it."""
    known = parse_name(name)
    if known is None:
        hint = "names are E=…,N=…,device_name=…[,dtype=…][,block_shape=[…]].json"
        raise InputError("the name is not that of a file of tuned configs", where=name, hint=hint)
    try:
        value = parse(data) if len(data) <= MAX_FILE_BYTES else None
    except ValueError as error:
        raise InputError(f"is no JSON ({str(error)[:80]})", where=name, hint=_HINT) from None
    if not isinstance(value, dict):
        raise InputError("is no object of configs by token count", where=name, hint=_HINT)
    triton = value.pop(VERSION_FIELD, None)
    if triton is not None and not isinstance(triton, str):
        raise InputError(f"{VERSION_FIELD} is no text", where=name, hint=_HINT)
    configs = {_tokens(tokens, name): _config(tokens, config, name) for tokens, config in value.items()}
    return TunedFile(name=known, configs=configs, triton=triton)


_HINT = "give a file as vLLM's or SGLang's tuner writes it"


def _tokens(text: str, name: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise InputError(f"{text[:40]!r} is no count of tokens", where=name, hint=_HINT)
    return int(text)


def _config(tokens: str, value: object, name: str) -> dict[str, Scalar]:
    flat = isinstance(value, dict) and all(map(is_scalar, (*value, *value.values())))
    if not isinstance(value, dict) or not flat or not 0 < len(value) <= MAX_FIELDS:
        raise InputError(f"the config of {tokens} tokens is no flat object", where=name, hint=_HINT)
    return value
