"""What a kernel set is compiled for (`LayerShape`), how (`KernelConfigs`), and what makes that impossible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecc.codegen.targets import Target
from moecc.errors import InputError
from moecc.ir.semantics import Activation, Router

DType = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer as one device computes it.

    x [tokens, hidden]; gate [experts, hidden]; gate_up [experts + shared, 2 * intermediate, hidden] (gate rows
    first); down [experts + shared, hidden, intermediate]. The `shared` experts see every token with weight 1 and
    have the ids experts .. experts + shared - 1; a shared expert that is n times as wide is n of them.
    `tokens` is the count that configs are tuned for: kernels take any count at run time.
    `has_router_bias`: a bias [experts] on the logits. `has_expert_bias`: gate_up_bias [experts + shared, 2 *
    intermediate] and down_bias [experts + shared, hidden]. The correction bias is `router.selection_bias`.
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int = 0
    dtype: DType = "bfloat16"
    router: Router = Router()
    activation: Activation = Activation()
    has_router_bias: bool = False
    has_expert_bias: bool = False

    def __post_init__(self) -> None:
        problem = _why_impossible(self)
        if problem:
            raise InputError(problem, where="layer shape")

    @property
    def total_experts(self) -> int:
        return self.experts + self.shared

    @property
    def slots_per_token(self) -> int:
        return self.top_k + self.shared

    @property
    def rows_per_expert(self) -> float:
        """Expected rows of a routed expert when every expert is chosen alike."""
        return self.tokens * self.top_k / self.experts


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Tile of a grouped GEMM. In gate_up a tile holds `block_n` gate columns and the same `block_n` up columns."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Tokens per program, block of the hidden dimension, and programs that share one token block's hidden dim."""

    block_t: int = 16
    block_h: int = 128
    split_h: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """Tile of the combine kernel. `fused`: the last arriving program of the down kernel combines instead."""

    block_t: int = 1
    block_h: int = 1024
    num_warps: int = 4
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelConfigs:
    """One layer's kernels on one target. gate_up and down share the tile map, so they share `block_m`."""

    router: RouterConfig
    gate_up: GemmConfig
    down: GemmConfig
    combine: CombineConfig = CombineConfig()


def tiles_max(tokens: int, top_k: int, experts: int, block_m: int) -> int:
    """The most row tiles that any routing of `tokens` x `top_k` distinct experts can need: a grid that is safe.

    Every expert holds at most `tokens` rows. The worst routing gives one row to as many experts as it can and
    then spends `block_m` rows on each further tile.
    """
    rows = tokens * min(top_k, experts)
    occupied = min(experts, rows)
    return min(occupied + (rows - occupied) // block_m, occupied * -(-tokens // block_m))


def gemm_shared_bytes(config: GemmConfig, *, weights: int, dtype: DType, target: Target) -> int:
    """Shared memory of one program, in bytes; `weights` is the number of weight tiles per K step (gate_up: 2).

    Triton keeps one buffer per pipeline stage. Where the dot reads its operands from registers (no wgmma) the
    last stage needs none.
    """
    raise NotImplementedError


def why_invalid(configs: KernelConfigs, shape: LayerShape, target: Target) -> str | None:
    """Why these configs cannot be compiled or launched for this shape and target, or None: the one predicate."""
    raise NotImplementedError


def _why_impossible(shape: LayerShape) -> str | None:
    router = shape.router
    sizes = {name: getattr(shape, name) for name in ("tokens", "hidden", "intermediate", "experts", "top_k")}
    for name, value in sizes.items():
        if value < 1:
            return f"{name} {value} is not positive"
    if shape.dtype not in DTYPE_BYTES:
        return f"dtype {shape.dtype!r} is none of {', '.join(DTYPE_BYTES)}"
    if shape.experts % router.groups:
        return f"{shape.experts} experts do not divide into {router.groups} groups"
    if not 1 <= router.top_groups <= router.groups:
        return f"top_groups {router.top_groups} is not in [1, {router.groups}]"
    selectable = shape.experts // router.groups * router.top_groups
    if shape.top_k > selectable:
        return f"top_k {shape.top_k} is larger than the {selectable} experts that can be selected"
    return None
