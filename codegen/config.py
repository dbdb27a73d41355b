"""What a kernel set is compiled for (`LayerShape`), how (`KernelConfigs`), and what makes that impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moecc.codegen.targets import Target
from moecc.errors import InputError
from moecc.ir.semantics import Activation, Router, why_impossible

DType = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer as one device computes it.

    x [tokens, hidden]; gate [experts, hidden]; gate_up [experts + shared, gate_up_columns, hidden], 2 * intermediate
    with the gate first, or intermediate where the activation has no gate and gate_up holds up alone; down [experts +
    shared, hidden, intermediate]. `transposed`: gate_up is [.., hidden, gate_up_columns] and down [.., intermediate,
    hidden]. `interleaved`: columns of gate and up take turns, gate first, in the bias too.
    The `shared` experts see every token with weight 1 and have the ids experts .. experts + shared - 1; a shared
    expert that is n times as wide is n of them.
    `tokens` is the count that configs are tuned for: kernels take any count at run time.
    `slots`: the number of experts whose weights this device holds, where tokens come from other devices; `received`:
    how many tokens those are, which bring as many rows as this device's own `tokens` have. None: all is here.
    `has_router_bias`: a bias [experts] on the logits. `has_expert_bias`: gate_up_bias [experts + shared,
    gate_up_columns] and down_bias [experts + shared, hidden]. The correction bias is `router.selection_bias`.
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int = 0
    slots: int | None = None
    received: int | None = None
    dtype: DType = "bfloat16"
    router: Router = field(default_factory=Router)
    activation: Activation = field(default_factory=Activation)
    has_router_bias: bool = False
    has_expert_bias: bool = False
    transposed: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        problem = _why_impossible(self)
        if problem:
            raise InputError(problem, where="layer shape")

    @property
    def router_columns(self) -> int:
        """Columns of the router's tile: groups and experts of a group are padded to powers of two, 16 at least."""
        groups = _next_power_of_2(self.router.groups)
        return max(groups * _next_power_of_2(self.experts // self.router.groups), 16)

    @property
    def gate_up_columns(self) -> int:
        return self.activation.gate_up_columns(self.intermediate)

    @property
    def gate_up_dots(self) -> int:
        """Weight tiles that a step of the first GEMM multiplies."""
        return 2 if self.activation.gated else 1

    @property
    def rows_per_expert(self) -> float:
        """Expected rows of a routed expert when every expert is chosen alike."""
        return self.tokens * self.top_k / (self.slots or self.experts)

    @property
    def expert_tokens(self) -> int:
        """Tokens that the kernels behind the router see."""
        return self.received or self.tokens

    @property
    def held_experts(self) -> int:
        """Experts whose weights this device holds, shared ones too: those that the GEMMs see."""
        return (self.slots or self.experts) + self.shared


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
    """Tile of the combine kernel; up to `fused_tokens` the last program of the down kernel combines instead."""

    fused_tokens: int = 32
    block_t: int = 1
    block_h: int = 1024
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class SumConfig:
    """Rows that a step of a column sum adds, and its columns."""

    block_r: int = 32
    block_n: int = 128
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class BackwardConfigs:
    """The kernels of the backward pass.

    grad_pre and grad_x walk the tile map of the forward pass and share its `block_m`. The gradients of weights take
    [block_m, block_n] elements of one expert's gradient and `block_k` of its rows at a time.
    """

    grad_pre: GemmConfig
    grad_x: GemmConfig
    grad_gate_up: GemmConfig
    grad_down: GemmConfig
    grad_bias: SumConfig = field(default_factory=SumConfig)


@dataclass(frozen=True, kw_only=True)
class KernelConfigs:
    """One layer's kernels on one target. gate_up and down share the tile map, so they share `block_m`.

    `backward`: those of the backward pass too, for training.
    """

    router: RouterConfig
    gate_up: GemmConfig
    down: GemmConfig
    combine: CombineConfig
    backward: BackwardConfigs | None = None

    @property
    def by_kernel(self) -> dict[str, RouterConfig | GemmConfig | CombineConfig | SumConfig]:
        """Every kernel's config under its name."""
        forward = {name: config for name, config in vars(self).items() if name != "backward"}
        return forward | (vars(self.backward) if self.backward else {})


def tile_shared_bytes(
    rows: int, columns: int, reduced: int, *, stages: int, dtype: DType, target: Target, dots: int = 1
) -> int:
    """Shared memory in bytes of a pipelined loop that multiplies [rows, reduced] by [reduced, columns].

    On x86: what the packed operands and the sums of one step take of the caches, an estimate.
    One buffer per stage; where the dot reads its operands from registers (rows below `wgmma_rows`, or float32,
    which no matrix unit multiplies exactly) the last stage needs none. `columns` counts both halves of a step
    with two dots. tcgen05 adds a barrier of 16 bytes a dot.
    """
    if target.backend == "x86":
        # Rows packed once, columns read where they lie (a copy of them past 32 rows); sums in fp32.
        packed = (max(rows, 16) + (columns if rows > 32 else 0)) * reduced * DTYPE_BYTES[dtype]
        return packed + max(rows, 16) * columns * 4
    from_shared = target.wgmma_rows and rows >= target.wgmma_rows and dtype != "float32"
    buffers = max(stages - (not from_shared), 1)
    barriers = 16 * dots if from_shared and target.name == "sm_100" else 0
    return (rows + columns) * reduced * DTYPE_BYTES[dtype] * buffers + barriers


def gemm_shared_bytes(config: GemmConfig, *, weights: int, dtype: DType, target: Target) -> int:
    """Shared memory in bytes of one program; `weights` is the number of weight tiles per K step (gate_up: 2)."""
    return tile_shared_bytes(
        config.block_m,
        weights * config.block_n,
        config.block_k,
        stages=config.num_stages,
        dtype=dtype,
        target=target,
        dots=weights,
    )


def why_invalid(configs: KernelConfigs, shape: LayerShape, target: Target) -> str | None:
    """Why these configs cannot be compiled or launched for this shape and target, or None: the one predicate."""
    kernels = configs.by_kernel
    for name in ("down", "grad_pre", "grad_x"):
        config = kernels.get(name, configs.gate_up)
        if isinstance(config, GemmConfig) and config.block_m != configs.gate_up.block_m:
            return f"gate_up block_m {configs.gate_up.block_m} is not {name} block_m {config.block_m}"
    return (
        _why_invalid_sizes(configs)
        or _why_invalid_gemm("gate_up", configs.gate_up, shape.gate_up_dots, shape, target)
        or _why_invalid_gemm("down", configs.down, 1, shape, target)
        or (configs.backward and _why_invalid_backward(configs.backward, shape, target))
        or _why_invalid_router(configs.router, shape, target)
    )


def _why_invalid_sizes(configs: KernelConfigs) -> str | None:
    free = ("group_m", "num_stages", "fused_tokens")
    for kernel, config in configs.by_kernel.items():
        for name, value in vars(config).items():
            at_least = 0 if name == "fused_tokens" else 1
            if value < at_least:
                return f"{kernel} {name} {value} is smaller than {at_least}"
            if name not in free and value & (value - 1):
                return f"{kernel} {name} {value} is not a power of two"
    return None


def _why_invalid_gemm(
    kernel: str, config: GemmConfig, weights: int, shape: LayerShape, target: Target
) -> str | None:
    if config.num_warps > target.max_warps:
        return f"{kernel} num_warps {config.num_warps} is larger than {target.max_warps}"
    if problem := _why_too_small(kernel, config, ("block_m", "block_n", "block_k"), target):
        return problem
    if target.backend == "interpret":
        return None
    shared = gemm_shared_bytes(config, weights=weights, dtype=shape.dtype, target=target)
    if shared > target.shared_bytes:
        return f"{kernel} needs {shared} bytes of {_memory(target)} of {target.shared_bytes}"
    return None


def _why_invalid_backward(configs: BackwardConfigs, shape: LayerShape, target: Target) -> str | None:
    gemms = [(name, config) for name, config in vars(configs).items() if isinstance(config, GemmConfig)]
    problems = (_why_invalid_gemm(name, config, 1, shape, target) for name, config in gemms)
    return next(filter(None, problems), None)


def _why_too_small(
    kernel: str, config: GemmConfig | RouterConfig, names: Sequence[str], target: Target
) -> str | None:
    """Vectors of one lane are dots too on x86, and one row is what decoding has."""
    if target.backend == "x86":
        return None
    for name in names:
        if getattr(config, name) < 16:
            return f"{kernel} {name} {getattr(config, name)} is smaller than 16, the least a dot takes"
    return None


def _memory(target: Target) -> str:
    return "cache" if target.backend == "x86" else "shared memory"


def _why_invalid_router(config: RouterConfig, shape: LayerShape, target: Target) -> str | None:
    if config.num_warps > target.max_warps:
        return f"router num_warps {config.num_warps} is larger than {target.max_warps}"
    if problem := _why_too_small("router", config, ("block_t", "block_h"), target):
        return problem
    blocks = -(-shape.hidden // config.block_h)
    if config.split_h > 1 and (config.split_h - 1) * -(-blocks // config.split_h) >= blocks:
        return f"router split_h {config.split_h} leaves a program without a block of hidden {shape.hidden}"
    shared = tile_shared_bytes(
        config.block_t,
        shape.router_columns,
        config.block_h,
        stages=config.num_stages,
        dtype=shape.dtype,
        target=target,
    )
    if shared > target.shared_bytes:
        return f"router needs {shared} bytes of {_memory(target)} of {target.shared_bytes}"
    return None


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _why_impossible(shape: LayerShape) -> str | None:
    sizes = {name: getattr(shape, name) for name in ("tokens", "hidden", "intermediate", "experts", "top_k")}
    for name, value in sizes.items():
        if value < 1:
            return f"{name} {value} is not positive"
    if shape.dtype not in DTYPE_BYTES:
        return f"dtype {shape.dtype!r} is none of {', '.join(DTYPE_BYTES)}"
    if shape.interleaved and not shape.activation.gated:
        return f"activation {shape.activation.kind} has no gate to interleave with up"
    if problem := why_impossible(shape.router, shape.experts, shape.top_k):
        return problem[0]
    return None
