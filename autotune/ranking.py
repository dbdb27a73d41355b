"""Configs of vLLM's `fused_moe`, best first, without a device.

A model of choice: the probability that a tile was measured best is a softmax over the valid tiles of a small network
on physical features (`features`); warps, stages and groups follow given the tile, a softmax of linear functions.
`benchmarks/fit_ranking.py` fits both to configs that people measured best and reports how well they carry over to
shapes and devices that were left out; `data/ranking.json` holds the coefficients with their provenance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from moecc.autotune.boards import Board
from moecc.autotune.features import Array, context_features, tile_features
from moecc.autotune.fused_moe import FusedMoeConfig, FusedMoeShape
from moecc.autotune.space import Tile, fused_moe_tiles, tile_configs

HEADS: Mapping[str, tuple[int, ...]] = {
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
    "group_size_m": (1, 16, 32, 64),
}
"""What is chosen given the tile, and the values that are told apart."""


@dataclass(frozen=True, kw_only=True)
class Ranker:
    """The coefficients. context [features, width]; tile [features, width]; hidden [width, inner]; and so on.

    heads: for each of HEADS [context and tile features and 1, values].
    """

    context: Array
    context_bias: Array
    tile: Array
    hidden: Array
    hidden_bias: Array
    output: Array
    heads: Mapping[str, Array]

    def tile_scores(self, tiles: Sequence[Tile], shape: FusedMoeShape, board: Board) -> Array:
        """Logarithms of the probabilities of the tiles, up to a constant."""
        context = np.array(list(context_features(shape, board).values()))
        features = np.stack(list(tile_features(tiles, shape, board).values()), axis=1)
        first = np.maximum(context @ self.context + self.context_bias + features @ self.tile, 0)
        scores: Array = np.maximum(first @ self.hidden + self.hidden_bias, 0) @ self.output
        return scores

    def config_score(self, config: FusedMoeConfig, features: Array) -> float:
        """Logarithm of the probability of warps, stages and groups given the tile, up to a constant."""
        return float(
            sum(
                (features @ self.heads[name])[values.index(getattr(config, name))]
                for name, values in HEADS.items()
            )
        )


def rank(shape: FusedMoeShape, board: Board) -> list[FusedMoeConfig]:
    """Every valid config. First one of each tile, tiles by score; then the second of each, and so on.

    The tile decides most of the time, so the head of the list tries many of them.
    """
    ranker, tiles = load_ranker(), fused_moe_tiles(shape.precision, board)
    order = np.argsort(-ranker.tile_scores(tiles, shape, board), kind="stable")
    variants = [_variants(ranker, tiles[index], shape, board) for index in order]
    longest = max((len(configs) for configs in variants), default=0)
    return [configs[turn] for turn in range(longest) for configs in variants if turn < len(configs)]


def _variants(ranker: Ranker, tile: Tile, shape: FusedMoeShape, board: Board) -> list[FusedMoeConfig]:
    features = head_features(tile, shape, board)
    configs = tile_configs(tile, shape.precision, board)
    return sorted(configs, key=lambda config: (-ranker.config_score(config, features), config))


def head_features(tile: Tile, shape: FusedMoeShape, board: Board) -> Array:
    """What warps, stages and groups depend on: context, tile, 1."""
    values = [float(column[0]) for column in tile_features([tile], shape, board).values()]
    return np.array([*context_features(shape, board).values(), *values, 1.0])


@cache
def load_ranker() -> Ranker:
    """The shipped coefficients."""
    text = (resources.files("moecc.autotune") / "data" / "ranking.json").read_text(encoding="utf-8")
    return ranker_of(json.loads(text)["coefficients"])


def ranker_of(coefficients: Mapping[str, Any]) -> Ranker:
    arrays = {name: np.array(value) for name, value in coefficients.items() if name != "heads"}
    heads = {name: np.array(value) for name, value in coefficients["heads"].items()}
    return Ranker(**arrays, heads=heads)
