"""Fit the ranking of `fused_moe` configs to what people measured best; cross-validate it; rewrite its coefficients.

    MOECC_SHARED=../shared python benchmarks/fit_ranking.py [--write]

An entry is one token count of one file (`tuned_entries`). It is a hit at n if its tile (BLOCK_SIZE_M, _N, _K) is among
the n first tiles of the ranking; the list of configs that `moecc tune --rank-only` prints begins with one config of
each tile, so that its first n configs hold the same n tiles.

shapes: five folds over (E, N); every entry of a shape, on all devices and in all precisions, is left out together.
devices and shapes: of each device (boards of equal architecture, core count and bandwidth are one: H100 and H800)
and each fold, by coefficients fitted without any entry of that device and without any of those shapes.
chips and shapes: the same, where boards that differ in bandwidth only are one too (H100, H200 and H800).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tuned_entries import Entry, tuned_entries

from moecc.autotune.features import context_features, tile_features
from moecc.autotune.ranking import HEADS, head_features
from moecc.autotune.space import fused_moe_tiles

FOLDS, WIDTH, INNER = 5, 32, 16
EPOCHS, BATCH, RATE, DECAY = 12, 128, 1e-2, 1e-2
BLUR = 0.1  # noise on the context's figures: the files do not say hidden size and top_k
NAMELESS = 0.3  # part of each batch without its architecture's flags, so that figures carry over
HEAD_STEPS, HEAD_DECAY = 300, 1e-4
OUTPUT = Path(__file__).resolve().parents[1] / "autotune" / "data" / "ranking.json"
Ints = NDArray[np.int64]


@dataclass
class Choices:
    """context [entries, features], tiles [entries, tiles, features], valid [entries, tiles], chosen [entries].

    An entry whose tile is not in the space has chosen -1: it is never fitted and always a miss.
    architectures, figures: the features of the context that are flags of one, and those that are no flags at all.
    """

    context: Tensor
    tiles: Tensor
    valid: Tensor
    chosen: Tensor
    architectures: list[int]
    figures: list[int]


class Network(nn.Module):
    def __init__(self, context: int, tile: int) -> None:
        super().__init__()
        self.context = nn.Linear(context, WIDTH)
        self.tile = nn.Linear(tile, WIDTH, bias=False)
        self.hidden = nn.Linear(WIDTH, INNER)
        self.output = nn.Linear(INNER, 1, bias=False)

    def forward(self, context: Tensor, tiles: Tensor, valid: Tensor) -> Tensor:
        first = torch.relu(self.context(context)[:, None] + self.tile(tiles))
        scores: Tensor = self.output(torch.relu(self.hidden(first)))[..., 0]
        return scores.masked_fill(~valid, -30.0)


def choices(entries: list[Entry]) -> Choices:
    spaces = [fused_moe_tiles(entry.shape.precision, entry.board) for entry in entries]
    most = max(map(len, spaces))
    names = context_features(entries[0].shape, entries[0].board)
    contexts, tiles, valid, chosen = [], [], [], []
    for entry, space in zip(entries, spaces, strict=True):
        contexts.append(list(context_features(entry.shape, entry.board).values()))
        features = np.stack(list(tile_features(space, entry.shape, entry.board).values()), axis=1)
        tiles.append(np.pad(features, ((0, most - len(space)), (0, 0))).astype(np.float32))
        valid.append(np.arange(most) < len(space))
        chosen.append(space.index(entry.config.tile) if entry.config.tile in space else -1)
    return Choices(
        torch.tensor(contexts, dtype=torch.float32),
        torch.from_numpy(np.stack(tiles)),
        torch.from_numpy(np.stack(valid)),
        torch.tensor(chosen),
        [index for index, name in enumerate(names) if name.startswith(("is sm_", "is gfx"))],
        [index for index, name in enumerate(names) if name.startswith(("log", "top_k"))],
    )


def fit(data: Choices, rows: Ints) -> Network:
    """Cross entropy of the tuned tiles by AdamW with one cycle of the learning rate (Smith 2018)."""
    torch.manual_seed(0)
    known = torch.from_numpy(rows)
    known = known[data.chosen[known] >= 0]
    network = Network(data.context.shape[1], data.tiles.shape[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(known) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in known[torch.randperm(len(known))].split(BATCH):
            context = data.context[batch]
            context[:, data.figures] += BLUR * torch.randn(len(batch), len(data.figures))
            context[: int(NAMELESS * len(batch)), data.architectures] = 0.0
            scores = network(context, data.tiles[batch], data.valid[batch])
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, data.chosen[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network


def places(network: Network, data: Choices, rows: Ints) -> Ints:
    """The place of each tuned tile in the ranking, from 0; a tile that is not in the space comes after all."""
    index = torch.from_numpy(rows)
    with torch.no_grad():
        scores = network(data.context[index], data.tiles[index], data.valid[index])
    chosen = data.chosen[index]
    own = scores.gather(1, chosen.clamp(min=0)[:, None])
    place = (scores > own).sum(1)
    return torch.where(chosen >= 0, place, scores.shape[1]).numpy()


def folds(entries: list[Entry]) -> Ints:
    shapes = sorted({(entry.name.experts, entry.name.intermediate) for entry in entries})
    shuffled = np.random.default_rng(0).permutation(len(shapes))
    fold_of = {shapes[index]: place % FOLDS for place, index in enumerate(shuffled)}
    return np.array([fold_of[entry.name.experts, entry.name.intermediate] for entry in entries])


def shapes_left_out(entries: list[Entry], data: Choices) -> Ints:
    fold, found = folds(entries), np.zeros(len(entries), dtype=np.int64)
    for number in range(FOLDS):
        outside = np.flatnonzero(fold == number)
        found[outside] = places(fit(data, np.flatnonzero(fold != number)), data, outside)
    return found


def groups_and_shapes_left_out(entries: list[Entry], data: Choices, groups: NDArray[np.str_]) -> Ints:
    fold, found = folds(entries), np.zeros(len(entries), dtype=np.int64)
    for group in np.unique(groups):
        for number in range(FOLDS):
            outside = np.flatnonzero((groups == group) & (fold == number))
            if len(outside):
                network = fit(data, np.flatnonzero((groups != group) & (fold != number)))
                found[outside] = places(network, data, outside)
        report(f"  {group}", found[groups == group])
    return found


def report(what: str, place: Ints) -> None:
    hits = ", ".join(f"top {count}: {100 * np.mean(place < count):.1f} %" for count in (1, 3, 5, 10, 32))
    print(f"{what}: {len(place)} entries, {hits}", flush=True)


def fit_heads(entries: list[Entry]) -> dict[str, Tensor]:
    """Logistic regressions of warps, stages and groups on what is known of the tuned tile."""
    features = np.array([head_features(e.config.tile, e.shape, e.board) for e in entries])
    inputs = torch.tensor(features, dtype=torch.float32)
    found = {}
    for name, values in HEADS.items():
        logs = np.log2(np.array([getattr(entry.config, name) for entry in entries]))
        nearest = torch.tensor(np.abs(logs[:, None] - np.log2(values)).argmin(1))
        weights = torch.zeros(inputs.shape[1], len(values), requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=0.05)
        for _ in range(HEAD_STEPS):
            loss = (
                nn.functional.cross_entropy(inputs @ weights, nearest) + HEAD_DECAY * weights.square().sum()
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        right = ((inputs @ weights).argmax(1) == nearest).float().mean()
        print(f"{name} given the tile: the likeliest is the tuned one in {100 * right:.1f} % (not held out)")
        found[name] = weights.detach()
    return found


def write(entries: list[Entry], network: Network, heads: Mapping[str, Tensor]) -> None:
    def plain(values: Tensor) -> list[object]:
        found: list[object] = np.round(values.detach().double().numpy(), 4).tolist()
        return found

    coefficients = {
        "context": plain(network.context.weight.T),
        "context_bias": plain(network.context.bias),
        "tile": plain(network.tile.weight.T),
        "hidden": plain(network.hidden.weight.T),
        "hidden_bias": plain(network.hidden.bias),
        "output": plain(network.output.weight[0]),
        "heads": {name: plain(values) for name, values in heads.items()},
    }
    provenance = {
        "script": "benchmarks/fit_ranking.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "source": "tuned fused_moe configs shipped with vllm 0.33.0 and sglang 0.5.23 on PyPI",
        "licence": "Apache-2.0",
        "entries": len(entries),
    }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in coefficients.items()]
    body = ",\n".join(lines)
    OUTPUT.write_text(f'{{"provenance": {json.dumps(provenance)},\n"coefficients": {{\n{body}}}}}\n')
    print(f"{OUTPUT.name} written")


def main() -> None:
    torch.set_num_threads(1)
    entries = tuned_entries()
    data = choices(entries)
    if "--write" in sys.argv:
        write(entries, fit(data, np.arange(len(entries))), fit_heads(entries))
    report("shapes left out", shapes_left_out(entries, data))
    chips = np.array([f"{entry.board.target}, {entry.board.cores} cores" for entry in entries])
    speeds = np.array([f", {entry.board.memory_bandwidth_gb_s:g} GB/s" for entry in entries])
    devices = np.strings.add(chips, speeds)
    report("devices and shapes left out", groups_and_shapes_left_out(entries, data, devices))
    report("chips and shapes left out", groups_and_shapes_left_out(entries, data, chips))


if __name__ == "__main__":
    main()
