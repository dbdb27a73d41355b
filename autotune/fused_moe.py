"""vLLM's Triton kernel `fused_moe`: what it computes (`FusedMoeShape`), its config, and when a config is invalid.

Both GEMMs of a layer run it, with one config. SGLang's kernel of that name takes the same configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.autotune.boards import Board
from moecc.errors import InputError

KERNEL = "vllm.fused_moe"
"""The name of the kernel in keys of the cache."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the kernel multiplies: bytes of an activation and of a weight in its loads, vLLM's word in file names."""

    activation_bytes: float
    weight_bytes: float
    tag: str | None
    block: int = 0

    @property
    def is_mixed(self) -> bool:
        """Weights become the activations' type in registers, so the dot reads them from there."""
        return self.activation_bytes != self.weight_bytes


PRECISIONS: Mapping[str, Precision] = {
    "bfloat16": Precision(activation_bytes=2, weight_bytes=2, tag=None),
    "float16": Precision(activation_bytes=2, weight_bytes=2, tag=None),
    "fp8": Precision(activation_bytes=1, weight_bytes=1, tag="fp8_w8a8"),
    "fp8_block": Precision(activation_bytes=1, weight_bytes=1, tag="fp8_w8a8", block=128),
    "int8_w8a8": Precision(activation_bytes=1, weight_bytes=1, tag="int8_w8a8"),
    "int8_w8a16": Precision(activation_bytes=2, weight_bytes=1, tag="int8_w8a16"),
    "int4_w4a16": Precision(activation_bytes=2, weight_bytes=0.5, tag="int4_w4a16"),
}


@dataclass(frozen=True, kw_only=True)
class FusedMoeShape:
    """A layer as one device computes it: `experts` and `intermediate` are this device's; `tokens` all that it sees.

    Experts have two up matrices (gate and up) and one down matrix, or one each where not `gated`.
    Raises InputError for sizes that no layer has, and for a precision that is not in PRECISIONS.
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: str = "bfloat16"
    gated: bool = True

    def __post_init__(self) -> None:
        for name in ("experts", "hidden", "intermediate", "top_k", "tokens"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{getattr(self, name)} is not positive", where=_flag(name), hint="use 1 or more"
                )
        if self.dtype not in PRECISIONS:
            hint = f"known: {', '.join(PRECISIONS)}"
            raise InputError(f"unknown dtype {self.dtype!r}", where="--dtype", hint=hint)

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    @property
    def up_columns(self) -> int:
        return (2 if self.gated else 1) * self.intermediate


@dataclass(frozen=True, kw_only=True, order=True)
class FusedMoeConfig:
    """Tile and pipeline of the kernel, under the names of vLLM's files in lower case."""

    block_size_m: int
    block_size_n: int
    block_size_k: int
    group_size_m: int
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.block_size_m, self.block_size_n, self.block_size_k

    def as_vllm(self) -> dict[str, int]:
        """The config under vLLM's names, in the order of its files."""
        return {vllm: getattr(self, name) for name, vllm in VLLM_NAMES.items()}


VLLM_NAMES: Mapping[str, str] = {
    "block_size_m": "BLOCK_SIZE_M",
    "block_size_n": "BLOCK_SIZE_N",
    "block_size_k": "BLOCK_SIZE_K",
    "group_size_m": "GROUP_SIZE_M",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}


def shared_bytes(config: FusedMoeConfig, precision: Precision, board: Board) -> float:
    """Shared memory in bytes of one program.

    One buffer per stage where the dot reads both operands from shared memory (wgmma, tcgen05); one less where the
    last stage is in registers: rows below 64, older GPUs, weights that are converted first. Exact for bf16 on sm_90.
    On AMD one buffer, which is right up to two stages and a lower bound beyond: what Triton makes of more stages
    there changed from version to version.
    Scaled blocks bound BLOCK_SIZE_K: the kernel's launcher cuts it to the block.
    """
    block_k = min(config.block_size_k, precision.block or config.block_size_k)
    loads = config.block_size_m * precision.activation_bytes + config.block_size_n * precision.weight_bytes
    return loads * block_k * _buffers(config, precision, board)


def _buffers(config: FusedMoeConfig, precision: Precision, board: Board) -> int:
    if board.is_amd:
        return 1
    from_shared = board.wgmma_rows and config.block_size_m >= board.wgmma_rows and not precision.is_mixed
    return max(config.num_stages - (not from_shared), 1)


def why_invalid(config: FusedMoeConfig, precision: Precision, board: Board) -> str | None:
    """Why the kernel cannot be compiled or launched with this config on this board, or None: the one predicate."""
    for name, vllm in VLLM_NAMES.items():
        value = getattr(config, name)
        if value < 1:
            return f"{vllm} {value} is smaller than 1"
        if value & (value - 1) and name not in ("group_size_m", "num_stages"):
            return f"{vllm} {value} is not a power of two"
    least_k = 32 if precision.activation_bytes == 1 else 16
    if config.block_size_k < least_k:
        return f"BLOCK_SIZE_K {config.block_size_k} is smaller than {least_k}, the least a dot takes"
    most_warps = 16 if board.is_amd else 32
    if config.num_warps > most_warps:
        return f"num_warps {config.num_warps} is larger than {most_warps}"
    needed, limit = shared_bytes(config, precision, board), board.shared_memory_kb * 1024
    if needed > limit:
        return f"it needs {needed:.0f} bytes of shared memory of {limit:.0f}"
    return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
