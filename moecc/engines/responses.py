"""Routed experts that vLLM returns (`--enable-return-routed-experts`): arrays [tokens, layers, top_k] of integers.

As .npy files, as base64 of them, or inside answers of the API, one JSON value or one a line: `routed_experts` of a
choice, `prompt_routed_experts` beside the choices; nested lists, as older versions send them, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moecc.engines.files import (
    NUMPY_MAGIC,
    Ints,
    decode_npy,
    parse_json,
    read_npy,
    read_text,
    tensor_ints,
    wrong,
)

KEY, PROMPT_KEY = "routed_experts", "prompt_routed_experts"
# base64 of the first bytes of every .npy file
BASE64_MAGIC = "k05VTVBZ"


def sequences(path: Path, start: bytes) -> list[Ints]:
    """[tokens, layers, top_k] of every sequence in a file; start: the file's first bytes."""
    if start.startswith(NUMPY_MAGIC):
        return [_array(path, "array", read_npy(path))]
    text = read_text(path)
    if text.lstrip().startswith(BASE64_MAGIC):
        return [_array(path, "array", decode_npy(path, text))]
    found = [part for where, value in values(path, text) for part in _answers(path, where, value)]
    if not found:
        wrong(path, f"no '{KEY}' in it", "serve with --enable-return-routed-experts and save the answers")
    return found


def values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of one JSON value, or of every line of several."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if len(lines) > 1 and first[:1] + first[-1:] in ("{}", '""'):
        for number, line in lines:
            yield f"{path}:{number}", parse_json(path, line, number)
    else:
        yield str(path), parse_json(path, text)


def _answers(path: Path, where: str, value: Any) -> Iterator[Ints]:
    if isinstance(value, str):
        yield _array(path, where, value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, (str, dict)):
                wrong(
                    f"{where}[{index}]",
                    f"a {type(item).__name__} is no answer",
                    f"save whole answers with '{KEY}'",
                )
            yield from _answers(path, f"{where}[{index}]", item)
    elif isinstance(value, dict):
        choices = value.get("choices", [value])
        if not isinstance(choices, list):
            wrong(where, "'choices' is not a list", "save whole answers of the API")
        prompt = value.get(PROMPT_KEY)
        before = [] if prompt is None else [_array(path, f"{where}: {PROMPT_KEY}", prompt)]
        for index, choice in enumerate(choices):
            routed = choice.get(KEY) if isinstance(choice, dict) else None
            after = [] if routed is None else [_array(path, f"{where}: {KEY} of choice {index}", routed)]
            if parts := before + after:
                yield _joined(where, parts)
            before = []


def _joined(where: str, parts: list[Ints]) -> Ints:
    if len({part.shape[1:] for part in parts}) > 1:
        wrong(where, "prompt and answer have different layers or top_k", "save whole answers of one model")
    return np.concatenate(parts)


def _array(path: Path, where: str, value: Any) -> Ints:
    """An array, its base64, or nested lists. A two-dimensional one has one expert a token (as ExFlow's traces)."""
    if isinstance(value, str):
        value = decode_npy(Path(where), value)
    array = tensor_ints(path, where.removeprefix(f"{path}: "), value, (2, 3))
    return array[:, :, None] if array.ndim == 2 else array
