"""What the ranking knows of a tile on a board: ratios of physical quantities, no names of models or devices.

All logarithms are to base 2. A row is one token's visit to one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moecc.autotune.boards import Board
from moecc.autotune.fused_moe import PRECISIONS, FusedMoeShape
from moecc.autotune.space import Tile

Array = NDArray[np.float64]

_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_12", "gfx942", "gfx950")
_DTYPES = tuple(name for name in PRECISIONS if name != "float16")
_SIZES = (16, 32, 64, 128, 256)
_REDUCED = (32, 64, 128, 256)
_L2_BYTES_PER_US_AND_CORE = 48e3
"""32 bytes a clock at 1.5 GHz; only its logarithm matters, and that up to a constant."""


def context_features(shape: FusedMoeShape, board: Board) -> dict[str, float]:
    """The layer, its load and the board: the same for all tiles."""
    active, rows = active_experts(shape), shape.tokens * shape.top_k
    features = {
        "log tokens": _log(shape.tokens) / 4 - 1.5,
        "log rows per active expert": _log(rows / active) / 4 - 1,
        "log rows per expert": _log(rows / shape.experts) / 4,
        "log active experts": _log(active) / 4 - 1,
        "log experts": _log(shape.experts) / 4 - 1,
        "log intermediate": _log(shape.intermediate) / 4 - 2,
        "log hidden": _log(shape.hidden) / 4 - 3,
        "log cores": _log(board.cores) - 7,
        "log bandwidth": _log(board.memory_bandwidth_gb_s) - 11,
        "log peak": _log(_peak(shape, board)) - 9,
        "log weight time": _log(_weights_us(shape, board)) / 4 - 1.5,
        "top_k": shape.top_k / 8,
    }
    features |= {f"is {name}": float(board.target.startswith(name)) for name in _ARCHITECTURES}
    dtype = "bfloat16" if shape.dtype == "float16" else shape.dtype
    features |= {f"is {name}": float(dtype == name) for name in _DTYPES}
    return features | {
        f"intermediate not of {size}": float(shape.intermediate % size != 0) for size in (64, 128, 256)
    }


def tile_features(tiles: Sequence[Tile], shape: FusedMoeShape, board: Board) -> dict[str, Array]:
    """One value for each tile."""
    m, n, k = np.array(tiles, dtype=np.float64).T
    precision, active = shape.precision, active_experts(shape)
    rows, hidden, inner = shape.tokens * shape.top_k, shape.hidden, shape.intermediate
    # A share of x rows takes x/m tiles and half a tile more, an active expert at least one.
    row_tiles = np.maximum(active, rows / m + active / 2)
    up, down = np.ceil(shape.up_columns / n), np.ceil(hidden / n)
    up_steps, down_steps = np.ceil(hidden / k), np.ceil(inner / k)
    loads = (m * precision.activation_bytes + n * precision.weight_bytes) * k
    compute_us = 2 * row_tiles * m * n * k * (up * up_steps + down * down_steps) / (_peak(shape, board) * 1e6)
    l2_us = (
        row_tiles * (up * up_steps + down * down_steps) * loads / (board.cores * _L2_BYTES_PER_US_AND_CORE)
    )
    waves_up, waves_down = row_tiles * up / board.cores, row_tiles * down / board.cores
    memory = _log(_weights_us(shape, board))
    features = {
        "log m": np.log2(m) - 6,
        "log n": np.log2(n) - 6,
        "log k": np.log2(k) - 6,
        "log m to rows of an expert": (np.log2(m) - _log(rows / active)) / 4,
        "log padding": np.log2(row_tiles * m / rows) / 2,
        "log row tiles of an expert": np.log2(row_tiles / active) / 2,
        "log waves of up": np.log2(waves_up) / 4,
        "log waves of down": np.log2(waves_down) / 4,
        "fill of up": np.minimum(waves_up, 1),
        "fill of down": np.minimum(waves_down, 1),
        "last wave of up": waves_up / np.maximum(np.ceil(waves_up), 1),
        "last wave of down": waves_down / np.maximum(np.ceil(waves_down), 1),
        "log compute time": np.log2(compute_us) / 4 - 1.5,
        "log compute to memory": (np.log2(compute_us) - memory) / 4,
        "log L2 time": np.log2(l2_us) / 4 - 1.5,
        "log L2 to memory": (np.log2(l2_us) - memory) / 4,
        "waste of up": up * n / shape.up_columns - 1,
        "waste of down": down * n / hidden - 1,
        "waste of hidden": up_steps * k / hidden - 1,
        "waste of intermediate": down_steps * k / inner - 1,
        "log steps of up": np.log2(up_steps) / 4,
        "log steps of down": np.log2(down_steps) / 4,
        "shared memory": loads / (board.shared_memory_kb * 1024),
        "accumulators": m * n / 16384,
    }
    features |= {f"m is {size}": (m == size).astype(np.float64) for size in _SIZES}
    features |= {f"n is {size}": (n == size).astype(np.float64) for size in _SIZES}
    return features | {f"k is {size}": (k == size).astype(np.float64) for size in _REDUCED}


def active_experts(shape: FusedMoeShape) -> float:
    """Expected number of experts with a row under uniform routing, at least one."""
    chosen = min(shape.top_k / shape.experts, 1.0)
    return max(float(shape.experts * (1.0 - (1.0 - chosen) ** shape.tokens)), 1.0)


def _weights_us(shape: FusedMoeShape, board: Board) -> float:
    """Time to read the weights of the active experts at the full bandwidth."""
    elements = active_experts(shape) * (shape.up_columns + shape.intermediate) * shape.hidden
    return elements * shape.precision.weight_bytes / (board.memory_bandwidth_gb_s * 1e3)


def _peak(shape: FusedMoeShape, board: Board) -> float:
    return board.peak_tflops * (2 if shape.precision.activation_bytes == 1 else 1)


def _log(value: float) -> float:
    return float(np.log2(value))
