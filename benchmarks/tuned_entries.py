"""Configs that people measured best, read from `$MOECC_SHARED/data/tuned` (vLLM 0.33.0, SGLang 0.5.23, Apache-2.0)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moecc.autotune.boards import Board, board_names, find_board
from moecc.autotune.formats.tuned_files import TunedFile, TunedName, parse_file
from moecc.autotune.fused_moe import VLLM_NAMES, FusedMoeConfig, FusedMoeShape

SHARED = Path(os.environ.get("MOECC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TUNED = SHARED / "data" / "tuned"

# (experts, intermediate, hidden, top_k) of models that are served; the files do not say the last two.
MODELS = (
    (8, 14336, 4096, 2),
    (8, 16384, 6144, 2),
    (8, 32768, 6144, 2),
    (16, 6400, 4096, 2),
    (16, 14336, 4096, 2),
    (16, 24576, 8192, 2),
    (16, 10752, 6144, 4),
    (16, 8192, 5120, 1),
    (128, 8192, 5120, 1),
    (64, 1408, 2048, 6),
    (160, 1536, 5120, 8),
    (256, 2048, 7168, 8),
    (384, 2048, 7168, 8),
    (60, 1408, 2048, 4),
    (64, 2560, 3584, 8),
    (64, 1024, 2048, 8),
    (128, 1536, 4096, 8),
    (128, 768, 2048, 8),
    (160, 2560, 6144, 8),
    (128, 1408, 4096, 8),
    (256, 1536, 3072, 8),
    (64, 3584, 8192, 8),
    (64, 1536, 2560, 6),
    (128, 1856, 2688, 6),
    (512, 2688, 1024, 22),
    (128, 2880, 2880, 4),
    (512, 512, 2048, 10),
    (512, 1024, 4096, 10),
    (256, 512, 2048, 8),
    (256, 1024, 3072, 8),
    (192, 1536, 4096, 8),
    (128, 704, 2816, 8),
)
WITHOUT_GATE = ((128, 1856), (512, 2688))


@dataclass(frozen=True)
class Entry:
    """One token count of one file."""

    name: TunedName
    board: Board
    shape: FusedMoeShape
    config: FusedMoeConfig


def tuned_files() -> list[tuple[Path, TunedFile]]:
    return [(path, parse_file(path.name, path.read_bytes())) for path in sorted(TUNED.rglob("*.json"))]


def tuned_entries() -> list[Entry]:
    """Entries of the fused_moe kernel on known boards; of files that were copied from each other one each."""
    found: dict[tuple[TunedName, int, FusedMoeConfig], Entry] = {}
    for _, file in tuned_files():
        if file.name.device in board_names() and not file.name.down and not file.name.backend:
            for entry in entries_of(file):
                found.setdefault((entry.name, entry.shape.tokens, entry.config), entry)
    return list(found.values())


def entries_of(file: TunedFile) -> Iterator[Entry]:
    """InputError for a board that is not known."""
    board = find_board(file.name.device)
    for tokens, config in file.configs.items():
        if all(name in config for name in VLLM_NAMES.values()):
            values = {name: int(config[vllm]) for name, vllm in VLLM_NAMES.items()}
            yield Entry(file.name, board, likely_shape(file.name, tokens), FusedMoeConfig(**values))


def likely_shape(name: TunedName, tokens: int) -> FusedMoeShape:
    """The shape that was tuned: hidden size and top_k are those of a model with such experts, split or not."""
    model = _model(name.experts, name.intermediate)
    hidden, top_k = (model[2], model[3]) if model else (4096, _usual_top_k(name.experts))
    fused_shared = model is not None and name.experts == model[0] + 1
    return FusedMoeShape(
        experts=name.experts,
        hidden=hidden,
        intermediate=name.intermediate,
        top_k=top_k + fused_shared,
        tokens=tokens,
        dtype=precision_of(name),
        gated=model is None or model[:2] not in WITHOUT_GATE,
    )


def precision_of(name: TunedName) -> str:
    if name.dtype in (None, "bf16"):
        return "bfloat16"
    if name.dtype in ("fp8_w8a8", "float8"):
        return "fp8_block" if name.block_shape else "fp8"
    return str(name.dtype)


def _model(experts: int, intermediate: int) -> tuple[int, int, int, int] | None:
    """Tensor parallel splits first; then experts split too, with spare slots."""
    for model in MODELS:
        splits = [model[1] / parts for parts in (1, 2, 4, 8, 16)]
        if experts in (model[0], model[0] + 1) and intermediate in splits:
            return model
    for model in MODELS:
        splits = [model[1] / parts for parts in (1, 2, 4, 8)]
        locals_ = [model[0] / parts for parts in (1, 2, 4, 8, 16)]
        if intermediate in splits and any(abs(local - experts) <= 0.13 * local for local in locals_):
            return model
    return None


def _usual_top_k(experts: int) -> int:
    return 1 if experts == 1 else 2 if experts <= 16 else 8
