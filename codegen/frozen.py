"""The frozen table of a layer and what it means for each kernel: pure Python, shared by compiler and launcher.

Emitted modules carry this source, so it imports nothing else of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Up to here one program sorts all assignments in the router's own launch; beyond, a second launch does.
ONE_LAUNCH_TOKENS = 1024
SCATTER_BLOCK = 1024
# Tokens that a fused combine sums at a time.
FUSED_BLOCK_T = 16

Constants = dict[str, Any]
Config = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the layer computes. `router`, `activation` and `layout` (of experts' weights) are switches of kernels."""

    hidden: int
    intermediate: int
    experts: int
    shared: int
    top_k: int
    dtype: str
    has_expert_bias: bool
    router: Mapping[str, Any]
    activation: Mapping[str, Any]
    layout: Mapping[str, bool]

    @property
    def columns(self) -> int:
        """Outputs of the first expert GEMM: gate and up, or up alone."""
        return 2 * self.intermediate if self.activation["GATED"] else self.intermediate

    @property
    def slots(self) -> int:
        """Assignments of one token."""
        return self.top_k + self.shared

    @property
    def total_experts(self) -> int:
        return self.experts + self.shared


def tiles_max(tokens: int, top_k: int, experts: int, block_m: int) -> int:
    """The most row tiles that any routing of `tokens` to `top_k` distinct experts can need: the exact worst case.

    An expert holds at most `tokens` rows. The worst routing gives one row to as many experts as it can and then
    spends `block_m` rows on each further tile.
    """
    rows = tokens * min(top_k, experts)
    occupied = min(experts, rows)
    return min(occupied + (rows - occupied) // block_m, occupied * -(-tokens // block_m))


def tiles_of(tokens: int, slots: int, experts: int, shared: int, config: Config) -> int:
    """Row tiles to launch; the last `shared` experts are chosen by every token and need no worst case."""
    block_m = config["gate_up"]["BLOCK_M"]
    certain = shared * -(-tokens // block_m)
    return int(certain + tiles_max(tokens, slots - shared, experts - shared, block_m))


def counters_of(blocks: int, hidden: int, config: Config) -> int:
    """One for the plan and one a token block, or, later, one a column block of the down kernel."""
    return int(max(1 + blocks, -(-hidden // config["down"]["BLOCK_N"])))


def call_bytes(
    layer: Layer,
    config: Config,
    *,
    tokens: int,
    experts: int,
    shared: int,
    routed_here: bool,
    element_bytes: int,
) -> int:
    """Device memory in bytes that one call on `tokens` tokens allocates besides its output.

    experts: those whose weights are given, the `shared` ones among them. routed_here: the call routes; else ids and
    weights are the caller's.
    """
    slots = layer.slots
    blocks, parts = -(-tokens // config["router"]["BLOCK_T"]), config["router"]["SPLIT_H"]
    words = (4 if routed_here else 2) * tokens * slots + (blocks + 1) * experts + 2
    words += 2 * max(tiles_of(tokens, slots, experts, shared, config), 1) + counters_of(
        blocks, layer.hidden, config
    )
    words += parts * tokens * layer.experts if routed_here and parts > 1 else 0
    rows = tokens * min(slots, experts) * layer.intermediate + tokens * slots * layer.hidden
    return 4 * words + rows * element_bytes


def kernel_sequence(config: Config, tokens: int) -> tuple[str, ...]:
    """The kernels of one forward call, in order. External routing launches `plan` in place of `router`."""
    scatter = ("scatter",) if tokens > ONE_LAUNCH_TOKENS else ()
    combine = ("combine",) if tokens > config["combine"]["FUSED_TOKENS"] else ()
    return ("router", *scatter, "gate_up", "down", *combine)


def kernel_constants(
    layer: Layer,
    config: Config,
    *,
    tokens: int,
    slots: int,
    experts: int,
    backend: str,
    has_logits: bool = False,
    has_residual: bool = False,
    sort: bool = True,
    keep_h: bool = True,
    keep_pre: bool = False,
) -> dict[str, Constants]:
    """Every kernel's constexpr arguments and launch options for a call with `slots` assignments a token.

    backend: cuda, hip, x86 or interpret. sort: the router plans the tiles too. keep_h, keep_pre: what gate_up stores.
    """
    common = {"HIDDEN": layer.hidden, "BACKEND": backend}
    sizes = {"NUM_EXPERTS": experts, "TOP_K": slots}
    sorting = {"BLOCK_T": config["router"]["BLOCK_T"], "SCATTER_BLOCK": SCATTER_BLOCK}
    planning = {"BLOCK_M": config["gate_up"]["BLOCK_M"], "SCATTER": tokens <= ONE_LAUNCH_TOKENS, **sorting}
    router = _router_constants(layer, config["router"], has_logits) | {"SORT": sort}
    gemm = {
        **common,
        "INTERMEDIATE": layer.intermediate,
        "TOP_K": slots,
        "HAS_EXPERT_BIAS": layer.has_expert_bias,
    }
    fused = tokens <= config["combine"]["FUSED_TOKENS"]
    combining = {"FUSE_COMBINE": fused, "COMBINE_T": FUSED_BLOCK_T, "HAS_RESIDUAL": has_residual}
    keeping = {"KEEP_H": keep_h, "KEEP_PRE": keep_pre}
    down_layout = {"TRANSPOSED": layer.layout["TRANSPOSED"]}
    combine = {name: value for name, value in config["combine"].items() if name != "FUSED_TOKENS"}
    return {
        "router": {**common, **router, **planning},
        "plan": {**sizes, **planning, "BACKEND": backend, "num_warps": config["router"]["num_warps"]},
        "scatter": {**sizes, **sorting},
        "gate_up": {**gemm, **layer.activation, **layer.layout, **keeping, **config["gate_up"]},
        "down": {**gemm, **sizes, **combining, **down_layout, "WEIGHTED": True, **config["down"]},
        "combine": {**common, **sizes, "HAS_RESIDUAL": has_residual, **combine},
    }


def _router_constants(layer: Layer, config: Mapping[str, int], has_logits: bool) -> Constants:
    """Logits that are given need no gate GEMM to split."""
    sizes = {"NUM_EXPERTS": layer.experts, "NUM_SHARED": layer.shared, "TOP_K": layer.top_k}
    split = {"SPLIT_H": 1} if has_logits else {}
    return {**sizes, "HAS_LOGITS": has_logits, **layer.router, **config, **split}
