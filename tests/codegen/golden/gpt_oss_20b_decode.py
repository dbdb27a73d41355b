"""gpt_oss_20b_decode: one Mixture-of-Experts layer, emitted by moecc. Change the compiler, not this file.

32 experts, top-4, hidden 2880, intermediate 2880, bfloat16; tuned for 16 tokens, right for any number.
Router: top-k of the logits, then softmax. Activation: clamped_swiglu.
Launches of one forward at 16 tokens:
    sm_90: router gate_up down
    gfx942: router gate_up down
    x86: router gate_up down combine
    interpret: router gate_up down

forward(x, weights) runs the layer, route(x, weights) its router, experts(x, topk_ids, topk_weights, weights)
its experts for a routing made elsewhere; see Launcher. Without a GPU they run on CPU tensors where moecc is
installed, or with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

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


@triton.jit
def widen(values, BACKEND: tl.constexpr):
    """values in fp32. Triton's interpreter holds bf16 as raw integers: there the widening is a shift, and exact."""
    if BACKEND == "interpret" and values.dtype == tl.bfloat16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def narrow(values, dtype: tl.constexpr, BACKEND: tl.constexpr):
    """fp32 values in dtype, rounded to nearest even, which Triton's interpreter does not do for bf16."""
    if BACKEND == "interpret" and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    return values.to(dtype)


@triton.jit
def wrap(at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions inside [0, SIZE) in place of those past it; where blocks divide SIZE there are none.

    Then the positions stay contiguous for the compiler, which cannot see through a remainder.
    """
    if SIZE % BLOCK == 0:
        return at
    else:
        return at % SIZE


@triton.jit
def load_inside(ptrs, inside, WHOLE: tl.constexpr):
    """What ptrs hold, zero where it is not inside; a WHOLE block needs no mask."""
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, inside, other=0.0)


@triton.jit
def accumulate_dot(a, b, acc, BACKEND: tl.constexpr):
    """acc + a @ b in fp32; Triton's interpreter would multiply bf16 as raw integers."""
    if BACKEND == "interpret":
        return tl.dot(widen(a, BACKEND), widen(b, BACKEND), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def is_last_arrival(counter_ptr, arrivals, BACKEND: tl.constexpr):
    """True in exactly one of the `arrivals` programs that call this: the last one, which sees all they wrote.

    Nobody waits. The last program leaves the counter at zero, so that a captured graph can be replayed.
    """
    # The atomic releases one thread's writes: the barrier first gathers those of the whole program. On CDNA the
    # barrier does not wait for stores on their way to L2, so every wavefront does.
    if BACKEND == "hip":
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == arrivals - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def locate_tile(pid, num_tiles, COLUMN_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column block) of a program: GROUP_M row tiles walk the columns together and share L2."""
    group = pid // (GROUP_M * COLUMN_BLOCKS)
    within = pid % (GROUP_M * COLUMN_BLOCKS)
    tiles = min(num_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % tiles, within // tiles


@triton.constexpr_function
def blocks_at_once(columns):
    """Rows of a [rows, columns] tile of 2048 counts: with their addresses, 48 registers a thread at 4 warps."""
    return max(2048 // columns, 1)


@triton.jit
def count_before(chosen):
    """chosen [tokens, columns] 0 or 1 -> how many earlier tokens of the block chose the same column."""
    return tl.cumsum(chosen, axis=0) - chosen


@triton.jit
def build_plan(
    block_counts_ptr,  # [blocks, experts] in: rows per token block and expert; out: the first of those rows
    expert_offsets_ptr,  # [experts + 1] out
    tile_expert_ptr,  # [tiles_max] out
    tile_row_ptr,  # [tiles_max] out
    num_tiles_ptr,  # [1] out, at least 1: without rows the one tile is empty
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Offsets, row bases and tile map, by one program that scans PLAN_BLOCKS token blocks at a time."""
    EXPERT_BLOCK: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    PLAN_BLOCKS: tl.constexpr = blocks_at_once(EXPERT_BLOCK)
    expert = tl.arange(0, EXPERT_BLOCK)
    step = tl.arange(0, PLAN_BLOCKS)
    is_expert = expert < NUM_EXPERTS

    rows = tl.zeros([EXPERT_BLOCK], tl.int32)
    for start in range(0, num_blocks, PLAN_BLOCKS):
        block = start + step
        mask = (block < num_blocks)[:, None] & is_expert[None, :]
        rows += tl.sum(
            tl.load(block_counts_ptr + block[:, None] * NUM_EXPERTS + expert, mask, other=0), axis=0
        )
    row_ends = tl.cumsum(rows, axis=0)
    tl.store(expert_offsets_ptr, 0)
    tl.store(expert_offsets_ptr + 1 + expert, row_ends, is_expert)

    first_row = row_ends - rows
    tl.debug_barrier()  # the counts that other threads still read above are overwritten below
    for start in range(0, num_blocks, PLAN_BLOCKS):
        block = start + step
        mask = (block < num_blocks)[:, None] & is_expert[None, :]
        at = block_counts_ptr + block[:, None] * NUM_EXPERTS + expert
        counts = tl.load(at, mask, other=0)
        tl.store(at, first_row[None, :] + tl.cumsum(counts, axis=0) - counts, mask)
        first_row += tl.sum(counts, axis=0)

    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, axis=0)
    num_tiles = tl.max(tile_ends, axis=0)
    tl.store(num_tiles_ptr, tl.maximum(num_tiles, 1))
    if num_tiles == 0:
        tl.store(tile_expert_ptr, 0)
        tl.store(tile_row_ptr, 0)
    for i in range(0, tl.max(tiles, axis=0)):
        tile = tile_ends - tiles + i
        tl.store(tile_expert_ptr + tile, expert, i < tiles)
        tl.store(tile_row_ptr + tile, row_ends - rows + i * BLOCK_M, i < tiles)


@triton.jit
def scatter_slots(
    slot,
    num_slots,
    topk_ids_ptr,
    slot_rank_ptr,
    first_row_ptr,
    sorted_slots_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sorted_slots[row of slot] = slot, for a block of slots; an id outside [0, NUM_EXPERTS) has no row."""
    expert = tl.load(topk_ids_ptr + slot, slot < num_slots, other=-1).to(tl.int32)
    held = (expert >= 0) & (expert < NUM_EXPERTS)
    first_row = tl.load(first_row_ptr + slot // (TOP_K * BLOCK_T) * NUM_EXPERTS + expert, held, other=0)
    rank = tl.load(slot_rank_ptr + slot, held, other=0)
    tl.store(sorted_slots_ptr + first_row + rank, slot, held)


@triton.jit
def finish_plan(
    counter_ptr,
    topk_ids_ptr,
    slot_rank_ptr,
    block_counts_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    sorted_slots_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCATTER: tl.constexpr,
    SCATTER_BLOCK: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """The last token block to arrive builds the plan and, with SCATTER, the sorted order too."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    if is_last_arrival(counter_ptr, num_blocks, BACKEND):
        build_plan(
            block_counts_ptr,
            expert_offsets_ptr,
            tile_expert_ptr,
            tile_row_ptr,
            num_tiles_ptr,
            num_blocks,
            NUM_EXPERTS,
            BLOCK_M,
        )
        if SCATTER:
            # Other threads of this program read the bases that build_plan stored.
            tl.debug_barrier()
            for start in range(0, num_tokens * TOP_K, SCATTER_BLOCK):
                scatter_slots(
                    start + tl.arange(0, SCATTER_BLOCK),
                    num_tokens * TOP_K,
                    topk_ids_ptr,
                    slot_rank_ptr,
                    block_counts_ptr,
                    sorted_slots_ptr,
                    NUM_EXPERTS,
                    TOP_K,
                    BLOCK_T,
                )


@triton.jit(do_not_specialize=["num_tokens"])
def plan_kernel(
    topk_ids_ptr,  # [tokens, TOP_K] any integer type; ids of a token are distinct or outside [0, NUM_EXPERTS)
    slot_rank_ptr,  # [tokens, TOP_K] out: how many earlier tokens of the block chose the same expert
    block_counts_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    sorted_slots_ptr,  # [tokens * TOP_K] out, with SCATTER
    counters_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCATTER: tl.constexpr,
    SCATTER_BLOCK: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """The plan of a routing that was made elsewhere. Grid: token blocks."""
    EXPERT_BLOCK: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    expert = tl.arange(0, EXPERT_BLOCK)
    is_expert = expert < NUM_EXPERTS

    chosen = tl.zeros([BLOCK_T, EXPERT_BLOCK], tl.int32)
    for j in range(TOP_K):
        choice = tl.load(topk_ids_ptr + token * TOP_K + j, is_token, other=-1).to(tl.int32)
        chosen += ((choice[:, None] == expert[None, :]) & is_expert[None, :]).to(tl.int32)
    tl.store(block_counts_ptr + block * NUM_EXPERTS + expert, tl.sum(chosen, axis=0), is_expert)

    before = count_before(chosen)
    for j in range(TOP_K):
        choice = tl.load(topk_ids_ptr + token * TOP_K + j, is_token, other=-1).to(tl.int32)
        rank = tl.sum(tl.where(choice[:, None] == expert[None, :], before, 0), axis=1)
        tl.store(slot_rank_ptr + token * TOP_K + j, rank, is_token)

    finish_plan(
        counters_ptr,
        topk_ids_ptr,
        slot_rank_ptr,
        block_counts_ptr,
        expert_offsets_ptr,
        tile_expert_ptr,
        tile_row_ptr,
        num_tiles_ptr,
        sorted_slots_ptr,
        num_tokens,
        NUM_EXPERTS,
        TOP_K,
        BLOCK_T,
        BLOCK_M,
        SCATTER,
        SCATTER_BLOCK,
        BACKEND,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def scatter_kernel(
    topk_ids_ptr,
    slot_rank_ptr,
    first_row_ptr,
    sorted_slots_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCATTER_BLOCK: tl.constexpr,
):
    """The sorted order of many tokens, where one program would take too long. Grid: blocks of slots."""
    scatter_slots(
        tl.program_id(0) * SCATTER_BLOCK + tl.arange(0, SCATTER_BLOCK),
        num_tokens * TOP_K,
        topk_ids_ptr,
        slot_rank_ptr,
        first_row_ptr,
        sorted_slots_ptr,
        NUM_EXPERTS,
        TOP_K,
        BLOCK_T,
    )


@triton.constexpr_function
def padded_group(num_experts, groups):
    """Columns per group: a power of two, and no fewer than 16 columns in all, which a dot can produce."""
    return max(triton.next_power_of_2(num_experts // groups), 16 // triton.next_power_of_2(groups))


@triton.jit
def gate_logits(
    x_ptr,
    gate_ptr,
    token,
    expert,
    first_h,
    last_h,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """x[token] @ gate[expert].T over the hidden dimensions [first_h, last_h): [BLOCK_T, COLUMNS] fp32."""
    h = first_h + tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + h[None, :]
    gate_ptrs = gate_ptr + expert[None, :] * HIDDEN + h[:, None]
    logits = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
    for start in range(first_h, last_h, BLOCK_H):
        if HIDDEN % BLOCK_H == 0:
            x, gate = tl.load(x_ptrs), tl.load(gate_ptrs)
        else:
            inside = start + tl.arange(0, BLOCK_H) < HIDDEN
            x = tl.load(x_ptrs, inside[None, :], other=0.0)
            gate = tl.load(gate_ptrs, inside[:, None], other=0.0)
        logits = accumulate_dot(x, gate, logits, BACKEND)
        x_ptrs += BLOCK_H
        gate_ptrs += BLOCK_H
    return logits


@triton.jit
def score_logits(logits, SCORE: tl.constexpr):
    """Softmax over the columns, or the sigmoid of each."""
    if SCORE == "softmax":
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return exponentials / tl.sum(exponentials, axis=1)[:, None]
    return tl.sigmoid(logits)


@triton.jit
def drop_weak_groups(
    keys,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
):
    """keys [BLOCK_T, GROUP_BLOCK * GROUP_PAD] with -inf outside the TOP_GROUPS best groups of each token."""
    grouped = tl.reshape(keys, [BLOCK_T, GROUP_BLOCK, GROUP_PAD])
    strength = tl.max(grouped, axis=2)
    if GROUP_SCORE == "top2_sum":
        best = tl.argmax(grouped, axis=2)
        rest = tl.where(tl.arange(0, GROUP_PAD)[None, None, :] == best[:, :, None], float("-inf"), grouped)
        strength += tl.max(rest, axis=2)
    group = tl.arange(0, GROUP_BLOCK)
    strength = tl.where(group[None, :] < GROUPS, strength, float("-inf"))
    # A group's rank is how many groups beat it: cheaper than rounds of argmax for a handful of groups.
    this, other = strength[:, :, None], strength[:, None, :]
    beaten = (other > this) | ((other == this) & (group[None, None, :] < group[None, :, None]))
    rank = tl.sum(beaten.to(tl.int32), axis=2)
    kept = tl.where((rank < TOP_GROUPS)[:, :, None], grouped, float("-inf"))
    return tl.reshape(kept, [BLOCK_T, GROUP_BLOCK * GROUP_PAD])


@triton.jit
def mixer_weight(keys, JITTER: tl.constexpr):
    """The largest key's softmax among the keys near it, [BLOCK_T]: `Router` says what is near."""
    best = tl.max(keys, axis=1)[:, None]
    near = best - keys <= 2.0 * JITTER * tl.maximum(tl.abs(keys), best)
    return 1.0 / tl.sum(tl.where(near, tl.exp(keys - best), 0.0), axis=1)


@triton.jit
def take_top_k(
    keys,
    values,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    JITTER: tl.constexpr,
):
    """TOP_K rounds of argmax: columns and values of the selected, [BLOCK_T, SLOT_BLOCK] each.

    Every key is above -inf or not selectable, and at least TOP_K are selectable: the columns are distinct.
    Sparsemixer weights each by the keys that its round still has.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    j = tl.arange(0, SLOT_BLOCK)[None, :]
    columns = tl.zeros([BLOCK_T, SLOT_BLOCK], tl.int32)
    selected = tl.zeros([BLOCK_T, SLOT_BLOCK], tl.float32)
    for k in range(TOP_K):
        best = tl.argmax(keys, axis=1, tie_break_left=True)[:, None]
        is_best = column == best
        columns = tl.where(j == k, best, columns)
        taken = tl.sum(tl.where(is_best, values, 0.0), axis=1)
        weight = mixer_weight(keys, JITTER) if SCORE == "sparsemixer" else taken
        selected = tl.where(j == k, weight[:, None], selected)
        keys = tl.where(is_best, float("-inf"), keys)
    return columns, selected


@triton.jit
def mark_chosen(
    columns,
    is_token,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
):
    """1 where a token chose a column, [BLOCK_T, COLUMNS]; built only now to keep registers free for the rounds."""
    j = tl.arange(0, SLOT_BLOCK)[None, :]
    chosen = tl.zeros([BLOCK_T, COLUMNS], tl.int32)
    for k in range(TOP_K):
        pick = tl.sum(tl.where(j == k, columns, 0), axis=1)[:, None]
        chosen += (tl.arange(0, COLUMNS)[None, :] == pick).to(tl.int32)
    return tl.where(is_token[:, None], chosen, 0)


@triton.jit
def rank_in_block(
    chosen,
    columns,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
):
    """How many earlier tokens of the block chose the same column, [BLOCK_T, SLOT_BLOCK].

    Slots past TOP_K belong to experts that every token chooses: their rank is the position in the block.
    """
    before = count_before(chosen)
    j = tl.arange(0, SLOT_BLOCK)[None, :]
    ranks = tl.zeros([BLOCK_T, SLOT_BLOCK], tl.int32) + tl.arange(0, BLOCK_T)[:, None]
    for k in range(TOP_K):
        pick = tl.sum(tl.where(j == k, columns, 0), axis=1)[:, None]
        rank = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == pick, before, 0), axis=1)[:, None]
        ranks = tl.where(j == k, rank, ranks)
    return ranks


@triton.jit
def route_tokens(
    logits,
    correction_bias_ptr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    SELECTION_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_MIN: tl.constexpr,
    SCALE: tl.constexpr,
    JITTER: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """logits [BLOCK_T, COLUMNS] -> columns and weights of the selected, [BLOCK_T, SLOT_BLOCK] each."""
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    column = tl.arange(0, COLUMNS)
    is_expert = (column % GROUP_PAD < GROUP_SIZE) & (column // GROUP_PAD < GROUPS)
    logits = tl.where(is_expert[None, :], logits, float("-inf"))
    scores = logits
    if not SELECT_FIRST and SCORE != "sparsemixer":
        scores = score_logits(logits, SCORE)
    keys = scores
    if SELECTION_BIAS and not SELECT_FIRST:
        expert = column // GROUP_PAD * GROUP_SIZE + column % GROUP_PAD
        bias = tl.load(correction_bias_ptr + expert, is_expert, other=0.0)
        keys += widen(bias, BACKEND)[None, :]
    # The floor keeps -inf for what cannot be selected, so that ids stay distinct even where a logit is NaN: it ranks
    # last, on a GPU as in the interpreter.
    keys = tl.where(keys > -3.0e38, keys, -3.0e38)
    keys = tl.where(is_expert[None, :], keys, float("-inf"))
    if GROUPS > 1 and not SELECT_FIRST:
        keys = drop_weak_groups(keys, BLOCK_T, GROUPS, GROUP_BLOCK, GROUP_PAD, TOP_GROUPS, GROUP_SCORE)
    columns, weights = take_top_k(keys, scores, BLOCK_T, COLUMNS, TOP_K, SLOT_BLOCK, SCORE, JITTER)

    is_slot = (tl.arange(0, SLOT_BLOCK) < TOP_K)[None, :]
    if SELECT_FIRST:
        weights = score_logits(tl.where(is_slot, weights, float("-inf")), SCORE)
    elif NORMALIZE:
        total = tl.sum(tl.where(is_slot, weights, 0.0), axis=1) + NORM_EPS
        weights = weights / tl.maximum(total, NORM_MIN)[:, None]
    return columns, weights * SCALE


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    x_ptr,  # [tokens, HIDDEN]
    gate_ptr,  # [NUM_EXPERTS, HIDDEN]
    router_bias_ptr,  # [NUM_EXPERTS], added to the logits
    correction_bias_ptr,  # [NUM_EXPERTS], added for the selection only
    logits_ptr,  # HAS_LOGITS: [tokens, NUM_EXPERTS] in; else scratch fp32 [SPLIT_H, tokens, NUM_EXPERTS]
    topk_ids_ptr,  # [tokens, TOP_K + NUM_SHARED] int32 out
    topk_weights_ptr,  # [tokens, TOP_K + NUM_SHARED] fp32 out
    slot_rank_ptr,
    block_counts_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    sorted_slots_ptr,
    counters_ptr,  # [1 + token blocks] zero on entry and on exit
    num_tokens,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    SELECTION_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_MIN: tl.constexpr,
    SCALE: tl.constexpr,
    JITTER: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_H: tl.constexpr,
    SORT: tl.constexpr,  # the rows stay here: plan their tiles
    BLOCK_M: tl.constexpr,
    SCATTER: tl.constexpr,
    SCATTER_BLOCK: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: (token blocks, SPLIT_H). The last program of a token block selects, the last of all builds the plan."""
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    GROUP_BLOCK: tl.constexpr = triton.next_power_of_2(GROUPS)
    GROUP_PAD: tl.constexpr = padded_group(NUM_EXPERTS, GROUPS)
    COLUMNS: tl.constexpr = GROUP_BLOCK * GROUP_PAD
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    SLOT_BLOCK: tl.constexpr = triton.next_power_of_2(SLOTS)
    TOTAL_EXPERTS: tl.constexpr = NUM_EXPERTS + NUM_SHARED
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    column = tl.arange(0, COLUMNS)
    is_expert = (column % GROUP_PAD < GROUP_SIZE) & (column // GROUP_PAD < GROUPS)
    expert = tl.where(is_expert, column // GROUP_PAD * GROUP_SIZE + column % GROUP_PAD, 0)
    mask = is_token[:, None] & is_expert[None, :]
    logits_ptrs = logits_ptr + token.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]

    if HAS_LOGITS:
        logits = widen(tl.load(logits_ptrs, mask, other=0.0), BACKEND)
    else:
        PART_H: tl.constexpr = (HIDDEN + SPLIT_H * BLOCK_H - 1) // (SPLIT_H * BLOCK_H) * BLOCK_H
        first_h = tl.program_id(1) * PART_H
        last_h = min(first_h + PART_H, HIDDEN)
        row = tl.where(is_token, token, 0)
        logits = gate_logits(
            x_ptr, gate_ptr, row, expert, first_h, last_h, HIDDEN, BLOCK_T, COLUMNS, BLOCK_H, BACKEND
        )
        if SPLIT_H > 1:
            part_size = num_tokens.to(tl.int64) * NUM_EXPERTS
            tl.store(logits_ptrs + tl.program_id(1) * part_size, logits, mask)
            if not is_last_arrival(counters_ptr + 1 + block, SPLIT_H, BACKEND):
                return
            logits = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
            for part in range(SPLIT_H):
                logits += tl.load(logits_ptrs + part * part_size, mask, other=0.0)
    if HAS_ROUTER_BIAS:
        logits += widen(tl.load(router_bias_ptr + expert), BACKEND)[None, :]

    columns, weights = route_tokens(
        logits,
        correction_bias_ptr,
        BLOCK_T,
        COLUMNS,
        NUM_EXPERTS,
        TOP_K,
        SLOT_BLOCK,
        SCORE,
        SELECT_FIRST,
        SELECTION_BIAS,
        GROUPS,
        GROUP_BLOCK,
        GROUP_PAD,
        TOP_GROUPS,
        GROUP_SCORE,
        NORMALIZE,
        NORM_EPS,
        NORM_MIN,
        SCALE,
        JITTER,
        BACKEND,
    )
    # Slots past TOP_K are the shared experts: every token, weight 1.
    j = tl.arange(0, SLOT_BLOCK)[None, :]
    ids = columns // GROUP_PAD * GROUP_SIZE + columns % GROUP_PAD
    ids = tl.where(j < TOP_K, ids, NUM_EXPERTS + j - TOP_K)
    weights = tl.where(j < TOP_K, weights, 1.0)
    at = token[:, None] * SLOTS + j
    is_slot = is_token[:, None] & (j < SLOTS)
    tl.store(topk_ids_ptr + at, ids, is_slot)
    tl.store(topk_weights_ptr + at, weights, is_slot)
    if not SORT:
        return
    chosen = mark_chosen(columns, is_token, BLOCK_T, COLUMNS, TOP_K, SLOT_BLOCK)
    ranks = rank_in_block(chosen, columns, BLOCK_T, COLUMNS, TOP_K, SLOT_BLOCK)
    tl.store(slot_rank_ptr + at, ranks, is_slot)
    tl.store(block_counts_ptr + block * TOTAL_EXPERTS + expert, tl.sum(chosen, axis=0), is_expert)
    for s in tl.static_range(NUM_SHARED):
        tl.store(
            block_counts_ptr + block * TOTAL_EXPERTS + NUM_EXPERTS + s, tl.sum(is_token.to(tl.int32), axis=0)
        )

    finish_plan(
        counters_ptr,
        topk_ids_ptr,
        slot_rank_ptr,
        block_counts_ptr,
        expert_offsets_ptr,
        tile_expert_ptr,
        tile_row_ptr,
        num_tiles_ptr,
        sorted_slots_ptr,
        num_tokens,
        TOTAL_EXPERTS,
        SLOTS,
        BLOCK_T,
        BLOCK_M,
        SCATTER,
        SCATTER_BLOCK,
        BACKEND,
    )


@triton.jit
def clamp_gate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """Gate and up as the activation sees them. A GPU's plain minimum would turn a NaN into the limit."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
    return gate, up


@triton.jit
def squash(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """(function(gate), its derivative); whichever is not used costs nothing once compiled."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        return gate * share, share + gate * density
    elif ACTIVATION == "relu" or ACTIVATION == "relu2":
        positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu2":
            return positive * positive, 2.0 * positive
        else:
            return positive, tl.where(gate > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z), with 2 z = 2 sqrt(2 / pi) * (gate + 0.044715 gate^3).
        share = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
        steepness = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        return gate * share, share + gate * share * (1.0 - share) * steepness
    elif ACTIVATION == "identity":
        return gate, tl.full(gate.shape, 1.0, tl.float32)
    else:
        tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "clamped_swiglu")
        if ACTIVATION == "silu":
            share = tl.sigmoid(gate)
            return gate * share, share * (1.0 + gate * (1.0 - share))
        else:
            share = tl.sigmoid(ALPHA * gate)
            return gate * share, share * (1.0 + ALPHA * gate * (1.0 - share))


@triton.jit
def activate(
    gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
):
    """h of the two halves of the first GEMM; without a gate `gate` is all there is."""
    gate, up = clamp_gate(gate, up, ACTIVATION, LIMIT)
    h, _ = squash(gate, ACTIVATION, ALPHA)
    if GATED:
        h *= up
    return h


@triton.jit
def gate_up_kernel(
    x_ptr,  # [tokens, HIDDEN]
    gate_up_ptr,  # [experts, COLUMNS, HIDDEN], or [experts, HIDDEN, COLUMNS] where TRANSPOSED
    gate_up_bias_ptr,  # [experts, COLUMNS]
    h_ptr,  # [rows, INTERMEDIATE] out with KEEP_H, rows in sorted order
    pre_ptr,  # [rows, COLUMNS] out with KEEP_PRE: what the activation is applied to, in the order of the weights
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    KEEP_H: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once.

    GATED: COLUMNS is 2 * INTERMEDIATE, gate first, or gate and up in turn where INTERLEAVED; else INTERMEDIATE.
    """
    COLUMNS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
    COLUMN_STRIDE: tl.constexpr = 1 if TRANSPOSED else HIDDEN
    K_STRIDE: tl.constexpr = COLUMNS if TRANSPOSED else 1
    COLUMN_BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * COLUMN_BLOCKS:
        return
    tile, column_block = locate_tile(tl.program_id(0), num_tiles, COLUMN_BLOCKS, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(expert_offsets_ptr + expert + 1)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows and columns outside read what is inside: the loop then needs no mask for them, only the store does.
    token = tl.load(sorted_slots_ptr + row, is_row, other=0) // TOP_K
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + k[None, :]
    weights_ptr = gate_up_ptr + expert.to(tl.int64) * (COLUMNS * HIDDEN)
    gate_ptrs = (
        weights_ptr + wrap(n, INTERMEDIATE, BLOCK_N)[None, :] * (STEP * COLUMN_STRIDE) + k[:, None] * K_STRIDE
    )
    up_ptrs = gate_ptrs + UP * COLUMN_STRIDE
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        inside = k < HIDDEN - start
        x = load_inside(x_ptrs, inside[None, :], HIDDEN % BLOCK_K == 0)
        gate_weights = load_inside(gate_ptrs, inside[:, None], HIDDEN % BLOCK_K == 0)
        gate = accumulate_dot(x, gate_weights, gate, BACKEND)
        if GATED:
            up_weights = load_inside(up_ptrs, inside[:, None], HIDDEN % BLOCK_K == 0)
            up = accumulate_dot(x, up_weights, up, BACKEND)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * K_STRIDE
        up_ptrs += BLOCK_K * K_STRIDE

    is_column = n < INTERMEDIATE
    is_element = is_row[:, None] & is_column[None, :]
    if HAS_EXPERT_BIAS:
        bias_ptrs = gate_up_bias_ptr + expert * COLUMNS + n * STEP
        gate += widen(tl.load(bias_ptrs, is_column, other=0.0), BACKEND)[None, :]
        if GATED:
            up += widen(tl.load(bias_ptrs + UP, is_column, other=0.0), BACKEND)[None, :]
    if KEEP_PRE:
        pre_ptrs = pre_ptr + row.to(tl.int64)[:, None] * COLUMNS + n[None, :] * STEP
        tl.store(pre_ptrs, narrow(gate, pre_ptr.dtype.element_ty, BACKEND), is_element)
        if GATED:
            tl.store(pre_ptrs + UP, narrow(up, pre_ptr.dtype.element_ty, BACKEND), is_element)
    if KEEP_H:
        h = activate(gate, up, ACTIVATION, GATED, ALPHA, LIMIT)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
        tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty, BACKEND), is_element)


@triton.jit
def combine_rows(
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    token,
    n,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """out[token, n] = residual + the token's slots, j = 0, 1, ...; slots of other devices' experts are skipped."""
    is_token = token < num_tokens
    inside = is_token[:, None] & (n < HIDDEN)[None, :]
    at = token.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for j in range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + j
        expert = tl.load(topk_ids_ptr + slot, is_token, other=-1)
        held = (expert >= 0) & (expert < NUM_EXPERTS)
        partial = tl.load(
            partial_ptr + slot[:, None] * HIDDEN + n[None, :], inside & held[:, None], other=0.0
        )
        total += widen(partial, BACKEND)
    if HAS_RESIDUAL:
        total += widen(tl.load(residual_ptr + at, inside, other=0.0), BACKEND)
    tl.store(out_ptr + at, narrow(total, out_ptr.dtype.element_ty, BACKEND), inside)


@triton.jit
def combine_if_last(
    counter_ptr,
    arrivals,
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    n,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """The last program of a column block sums the columns that all of them stored."""
    if is_last_arrival(counter_ptr, arrivals, BACKEND):
        for start in range(0, num_tokens, BLOCK_T):
            combine_rows(
                partial_ptr,
                topk_ids_ptr,
                residual_ptr,
                out_ptr,
                start + tl.arange(0, BLOCK_T),
                n,
                num_tokens,
                HIDDEN,
                TOP_K,
                NUM_EXPERTS,
                HAS_RESIDUAL,
                BLOCK_T,
                BLOCK_N,
                BACKEND,
            )


@triton.jit(do_not_specialize=["num_tokens"])
def down_kernel(
    h_ptr,  # [rows, INTERMEDIATE]
    down_ptr,  # [experts, HIDDEN, INTERMEDIATE], or [experts, INTERMEDIATE, HIDDEN] where TRANSPOSED
    down_bias_ptr,  # [experts, HIDDEN]
    topk_ids_ptr,  # [tokens, TOP_K]
    topk_weights_ptr,  # [tokens, TOP_K], with WEIGHTED
    partial_ptr,  # [tokens * TOP_K, HIDDEN] out, by slot
    residual_ptr,  # [tokens, HIDDEN], with FUSE_COMBINE
    out_ptr,  # [tokens, HIDDEN] out, with FUSE_COMBINE
    sorted_slots_ptr,
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    counters_ptr,  # [column blocks] zero on entry and on exit, with FUSE_COMBINE
    num_tokens,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FUSE_COMBINE: tl.constexpr,
    COMBINE_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: tiles_max * column blocks; programs past the real number of tiles leave at once."""
    COLUMN_STRIDE: tl.constexpr = 1 if TRANSPOSED else INTERMEDIATE
    K_STRIDE: tl.constexpr = HIDDEN if TRANSPOSED else 1
    COLUMN_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * COLUMN_BLOCKS:
        return
    tile, column_block = locate_tile(tl.program_id(0), num_tiles, COLUMN_BLOCKS, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(expert_offsets_ptr + expert + 1)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    h_ptrs = h_ptr + tl.where(is_row, row, 0).to(tl.int64)[:, None] * INTERMEDIATE + k[None, :]
    weights_ptr = down_ptr + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE)
    down_ptrs = weights_ptr + wrap(n, HIDDEN, BLOCK_N)[None, :] * COLUMN_STRIDE + k[:, None] * K_STRIDE
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        inside = k < INTERMEDIATE - start
        h = load_inside(h_ptrs, inside[None, :], INTERMEDIATE % BLOCK_K == 0)
        weights = load_inside(down_ptrs, inside[:, None], INTERMEDIATE % BLOCK_K == 0)
        total = accumulate_dot(h, weights, total, BACKEND)
        h_ptrs += BLOCK_K
        down_ptrs += BLOCK_K * K_STRIDE

    is_column = n < HIDDEN
    if HAS_EXPERT_BIAS:
        bias = tl.load(down_bias_ptr + expert * HIDDEN + n, is_column, other=0.0)
        total += widen(bias, BACKEND)[None, :]
    slot = tl.load(sorted_slots_ptr + row, is_row, other=0)
    if WEIGHTED:
        total *= tl.load(topk_weights_ptr + slot, is_row, other=0.0)[:, None]
    partial_ptrs = partial_ptr + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(
        partial_ptrs,
        narrow(total, partial_ptr.dtype.element_ty, BACKEND),
        is_row[:, None] & is_column[None, :],
    )

    if FUSE_COMBINE:
        combine_if_last(
            counters_ptr + column_block,
            num_tiles,
            partial_ptr,
            topk_ids_ptr,
            residual_ptr,
            out_ptr,
            n,
            num_tokens,
            HIDDEN,
            TOP_K,
            NUM_EXPERTS,
            HAS_RESIDUAL,
            COMBINE_T,
            BLOCK_N,
            BACKEND,
        )


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    partial_ptr,
    topk_ids_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Grid: (token blocks, column blocks)."""
    combine_rows(
        partial_ptr,
        topk_ids_ptr,
        residual_ptr,
        out_ptr,
        tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T),
        tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H),
        num_tokens,
        HIDDEN,
        TOP_K,
        NUM_EXPERTS,
        HAS_RESIDUAL,
        BLOCK_T,
        BLOCK_H,
        BACKEND,
    )


Weights = Mapping[str, torch.Tensor]


class Plan(NamedTuple):
    """A routing in the order in which the GEMMs walk it; int32 unless said otherwise."""

    topk_ids: torch.Tensor  # [tokens, slots], any integer type
    topk_weights: torch.Tensor  # [tokens, slots] fp32
    slot_rank: torch.Tensor  # [tokens, slots]
    block_counts: torch.Tensor  # [token blocks, experts]
    expert_offsets: torch.Tensor  # [experts + 1]
    tile_expert: torch.Tensor  # [tiles_max]
    tile_row: torch.Tensor  # [tiles_max]
    num_tiles: torch.Tensor  # [1]
    sorted_slots: torch.Tensor  # [tokens * slots]
    counters: torch.Tensor  # zero between launches

    @property
    def tile_map(self) -> tuple[torch.Tensor, ...]:
        """What a GEMM reads, in the order of its arguments."""
        return (self.sorted_slots, self.expert_offsets, self.tile_expert, self.tile_row, self.num_tiles)


class Launcher:
    """One layer with its kernel configs: target -> kernel -> block sizes and launch options.

    `weights` maps, contiguous and in the layer's dtype: `gate` [experts, hidden]; `gate_up` [experts + shared,
    columns, hidden], gate and up or up alone; `down` [experts + shared, hidden, intermediate]; and, of any float type,
    where the layer has them: `router_bias` and `correction_bias` [experts], `gate_up_bias` [experts + shared,
    columns], `down_bias` [experts + shared, hidden]. In a transposed layout the last two dimensions of `gate_up` and
    `down` change places; in an interleaved one gate and up take turns.
    Every method raises ValueError for a tensor that does not fit, RuntimeError for a device without configs.
    """

    def __init__(self, layer: Layer, configs: Mapping[str, Config]) -> None:
        self.layer, self.configs = layer, configs
        self._idle_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._known_constants: dict[tuple[object, ...], dict[str, Constants]] = {}

    def forward(
        self,
        x: torch.Tensor,
        weights: Weights,
        *,
        residual: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer on x [..., hidden], plus `residual` of that shape; `logits` [..., experts] replace the gate."""
        rows = self._rows(x)
        if not len(rows):
            return torch.empty_like(x)
        plan = self._route(rows, weights, logits, sort=True)
        self._scatter(plan)
        return self._compute(rows, plan, weights, residual).reshape(x.shape)

    def route(
        self, x: torch.Tensor, weights: Weights, *, logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int32 and weights fp32 [tokens, top_k + shared]; the shared experts, weight 1, come last."""
        rows = self._rows(x)
        if not len(rows):
            empty = torch.empty((0, self.layer.slots), device=x.device)
            return empty.int(), empty
        return self._route(rows, weights, logits, sort=False)[:2]

    def experts(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: Weights,
        *,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts alone, for a routing made elsewhere: ids and weights [tokens, k], any k.

        The ids of a token are distinct; one outside [0, len(gate_up)) is another device's and adds nothing. The
        number of experts is that of the weights given.
        """
        rows = self._rows(x)
        if topk_ids.shape != topk_weights.shape:
            raise ValueError(
                f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} differ in shape"
            )
        plan = self._plan_given(rows, topk_ids, topk_weights, expert_count(weights, "gate_up"))
        if plan is None:
            return torch.zeros_like(x) if residual is None else residual.clone()
        return self._compute(rows, plan, weights, residual).reshape(x.shape)

    def launches(self, tokens: int, target: str) -> tuple[str, ...]:
        """The kernels that one `forward` launches, in order."""
        return kernel_sequence(self.configs[target], tokens)

    def workspace_bytes(self, tokens: int, target: str) -> int:
        """Device memory in bytes that `forward` allocates besides its output."""
        layer = self.layer
        return call_bytes(
            layer,
            self.configs[target],
            tokens=tokens,
            experts=layer.total_experts,
            shared=layer.shared,
            routed_here=True,
            element_bytes=getattr(torch, layer.dtype).itemsize,
        )

    def _route(
        self, rows: torch.Tensor, weights: Weights, logits: torch.Tensor | None, *, sort: bool
    ) -> Plan:
        layer, tokens = self.layer, len(rows)
        shape = (tokens, layer.slots)
        ids = torch.empty(shape, dtype=torch.int32, device=rows.device)
        topk_weights = torch.empty(shape, device=rows.device)
        plan = self._plan(ids, topk_weights, experts=layer.total_experts, shared=layer.shared)
        constants = self._constants(plan, layer.total_experts, has_logits=logits is not None, sort=sort)
        parts = constants["router"]["SPLIT_H"]
        if logits is not None:
            logits = logits.reshape(-1, layer.experts).contiguous()
            expect("logits", logits, (tokens, layer.experts))
            gate = logits
        else:
            gate = _tensor(weights, "gate", (layer.experts, layer.hidden), rows.dtype)
            scratch = (parts, tokens, layer.experts)
            logits = torch.empty(scratch, device=rows.device) if parts > 1 else rows
        biases = [
            _tensor(weights, name, (layer.experts,)) if layer.router[switch] else rows
            for name, switch in (("router_bias", "HAS_ROUTER_BIAS"), ("correction_bias", "SELECTION_BIAS"))
        ]
        grid = (len(plan.block_counts), parts)
        router_kernel[grid](rows, gate, *biases, logits, *plan, tokens, **constants["router"])
        return plan

    def _plan_given(
        self, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int
    ) -> Plan | None:
        """The plan of a routing that was made elsewhere, None if it is empty."""
        if topk_ids.ndim != 2 or len(topk_ids) != len(rows):
            raise ValueError(f"topk_ids are {list(topk_ids.shape)}, not [{len(rows)}, k]")
        if topk_ids.is_floating_point() or topk_ids.device != rows.device:
            raise ValueError(
                f"topk_ids are {topk_ids.dtype} on {topk_ids.device}, not integers on {rows.device}"
            )
        if not topk_ids.numel():
            return None
        plan = self._plan(topk_ids.contiguous(), topk_weights.float().contiguous(), experts=experts)
        constants = self._constants(plan, experts)["plan"]
        plan_kernel[(len(plan.block_counts),)](plan.topk_ids, *plan[2:], len(rows), **constants)
        self._scatter(plan)
        return plan

    def _scatter(self, plan: Plan) -> None:
        """Fills sorted_slots where the launch that planned has left it to a second one."""
        if len(plan.topk_ids) <= ONE_LAUNCH_TOKENS:
            return
        constants = self._constants(plan, len(plan.expert_offsets) - 1)
        grid = (triton.cdiv(plan.topk_ids.numel(), constants["scatter"]["SCATTER_BLOCK"]),)
        arrays = (plan.topk_ids, plan.slot_rank, plan.block_counts, plan.sorted_slots)
        scatter_kernel[grid](*arrays, len(plan.topk_ids), **constants["scatter"])

    def _compute(
        self, rows: torch.Tensor, plan: Plan, weights: Weights, residual: torch.Tensor | None
    ) -> torch.Tensor:
        h, _ = self._gate_up(rows, plan, weights)
        return self._down(h, plan, weights, residual)

    def _gate_up(
        self, rows: torch.Tensor, plan: Plan, weights: Weights, *, keep_h: bool = True, keep_pre: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h [rows, intermediate], pre [rows, columns]) in sorted order; what is not kept is an unrelated tensor."""
        layer, (tokens, slots) = self.layer, plan.topk_ids.shape
        experts = len(plan.expert_offsets) - 1
        gate_up, bias = self._expert_weights("gate_up", weights, experts, (layer.columns, layer.hidden))
        held = tokens * min(slots, experts)
        h = rows.new_empty((held, layer.intermediate)) if keep_h else rows
        pre = rows.new_empty((held, layer.columns)) if keep_pre else rows
        constants = self._constants(plan, experts, keep_h=keep_h, keep_pre=keep_pre)["gate_up"]
        grid = (len(plan.tile_expert) * triton.cdiv(layer.intermediate, constants["BLOCK_N"]),)
        gate_up_kernel[grid](rows, gate_up, bias, h, pre, *plan.tile_map, **constants)
        return h, pre

    def _down(
        self, h: torch.Tensor, plan: Plan, weights: Weights, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[tokens, hidden]: h [rows, intermediate] through the second GEMM, weighted and summed."""
        layer, (tokens, slots) = self.layer, plan.topk_ids.shape
        experts, hidden = len(plan.expert_offsets) - 1, layer.hidden
        down, bias = self._expert_weights("down", weights, experts, (hidden, layer.intermediate))
        if residual is not None:
            residual = residual.reshape(-1, hidden).contiguous()
            expect("residual", residual, (tokens, hidden))
        constants = self._constants(plan, experts, has_residual=residual is not None)
        partial = h.new_empty((tokens * slots, hidden))
        out = h.new_empty((tokens, hidden))
        tail = (out if residual is None else residual, out)
        grid = (len(plan.tile_expert) * triton.cdiv(hidden, constants["down"]["BLOCK_N"]),)
        routing = (plan.topk_ids, plan.topk_weights, partial, *tail, *plan.tile_map, plan.counters, tokens)
        down_kernel[grid](h, down, bias, *routing, **constants["down"])
        if not constants["down"]["FUSE_COMBINE"]:
            combine_slots(partial, plan.topk_ids, *tail, constants["combine"])
        return out

    def _expert_weights(
        self, name: str, weights: Weights, experts: int, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor of that name and its bias; `shape` is (outputs, inputs). Without a bias, the tensor twice."""
        stored = shape[::-1] if self.layer.layout["TRANSPOSED"] else shape
        tensor = _tensor(weights, name, (experts, *stored), getattr(torch, self.layer.dtype))
        if not self.layer.has_expert_bias:
            return tensor, tensor
        return tensor, _tensor(weights, f"{name}_bias", (experts, shape[0]))

    def _plan(self, ids: torch.Tensor, topk_weights: torch.Tensor, *, experts: int, shared: int = 0) -> Plan:
        tokens, slots = ids.shape
        config = self.configs[self._target(ids.device)]
        blocks = triton.cdiv(tokens, config["router"]["BLOCK_T"])
        tiles = max(tiles_of(tokens, slots, experts, shared, config), 1)
        sizes = (tokens * slots, blocks * experts, experts + 1, tiles, tiles, 1, tokens * slots)
        arrays = [torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes]
        arrays[1] = arrays[1].view(blocks, experts)
        counters = self._zero_counters(ids.device, counters_of(blocks, self.layer.hidden, config))
        return Plan._make((ids, topk_weights, *arrays, counters))

    def _zero_counters(self, device: torch.device, count: int) -> torch.Tensor:
        """Counters that are zero now; kernels leave them so, and launches on one stream share them."""
        # A capture only records the memset, and on the host a kernel may have stopped inside.
        if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        if key not in self._idle_counters or len(self._idle_counters[key]) < count:
            self._idle_counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
        return self._idle_counters[key]

    def _constants(self, plan: Plan, experts: int, **switches: bool) -> dict[str, Constants]:
        """Made once: with memory streaming through the caches, what a call computes anew is slow."""
        tokens, slots = plan.topk_ids.shape
        target = self._target(plan.topk_ids.device)
        config = self.configs[target]
        key = (target, kernel_sequence(config, tokens), slots, experts, *switches.items())
        if key not in self._known_constants:
            self._known_constants[key] = kernel_constants(
                self.layer,
                config,
                tokens=tokens,
                slots=slots,
                experts=experts,
                backend=backend_of(target),
                **switches,
            )
        return self._known_constants[key]

    def _target(self, device: torch.device) -> str:
        if not isinstance(router_kernel, triton.JITFunction):
            target = "interpret"
        elif device.type == "cpu" and _runs_on_x86():
            target = "x86"
        elif device.type != "cuda":
            raise RuntimeError(
                f"no kernels for device {device}: set TRITON_DEFAULT_BACKEND=x86 where moecc is installed, or "
                "TRITON_INTERPRET=1 to interpret them there"
            )
        elif torch.version.hip:
            target = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        else:
            target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if target not in self.configs:
            raise RuntimeError(f"no configs for {target}: this module has {', '.join(self.configs)}")
        return target

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.layer.hidden or x.dtype != getattr(torch, self.layer.dtype):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}, not {self.layer.dtype} [..., {self.layer.hidden}]"
            )
        return x.reshape(-1, self.layer.hidden).contiguous()


def combine_slots(
    partial: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    constants: Constants,
) -> None:
    """out [tokens, hidden] = the sum of each token's slots of `partial`, and of `residual` if the constants say so."""
    grid = (triton.cdiv(len(out), constants["BLOCK_T"]), triton.cdiv(out.shape[1], constants["BLOCK_H"]))
    combine_kernel[grid](partial, topk_ids, residual, out, len(out), **constants)


def _runs_on_x86() -> bool:
    """Whether Triton's driver is moecc's backend for CPU tensors."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "x86")


def backend_of(target: str) -> str:
    if target in ("interpret", "x86"):
        return target
    return "hip" if target.startswith("gfx") else "cuda"


def _tensor(
    weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """weights[name], of that shape, contiguous, and of that dtype if one is given."""
    if name not in weights:
        raise ValueError(f"weights lack {name!r} {list(shape)}")
    tensor = weights[name]
    expect(name, tensor, shape)
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    return tensor


def expert_count(weights: Weights, name: str) -> int:
    if name not in weights:
        raise ValueError(f"weights lack {name!r}")
    return len(weights[name])


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")


LAYER = Layer(
    hidden=2880,
    intermediate=2880,
    experts=32,
    shared=0,
    top_k=4,
    dtype="bfloat16",
    has_expert_bias=True,
    router={
        "SCORE": "softmax",
        "SELECT_FIRST": True,
        "SELECTION_BIAS": False,
        "GROUPS": 1,
        "TOP_GROUPS": 1,
        "GROUP_SCORE": "max",
        "NORMALIZE": False,
        "NORM_EPS": 0.0,
        "NORM_MIN": 0.0,
        "SCALE": 1.0,
        "JITTER": 0.0,
        "HAS_ROUTER_BIAS": True,
    },
    activation={"ACTIVATION": "clamped_swiglu", "GATED": True, "ALPHA": 1.702, "LIMIT": 7.0},
    layout={"TRANSPOSED": False, "INTERLEAVED": False},
)
CONFIGS: Mapping[str, Config] = {
    "sm_90": {
        "router": {"BLOCK_T": 16, "BLOCK_H": 128, "SPLIT_H": 8, "num_warps": 8, "num_stages": 3},
        "gate_up": {
            "BLOCK_M": 16,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "GROUP_M": 1,
            "num_warps": 4,
            "num_stages": 4,
        },
        "down": {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 1, "num_warps": 4, "num_stages": 4},
        "combine": {"FUSED_TOKENS": 32, "BLOCK_T": 1, "BLOCK_H": 1024, "num_warps": 4},
    },
    "gfx942": {
        "router": {"BLOCK_T": 16, "BLOCK_H": 32, "SPLIT_H": 8, "num_warps": 8, "num_stages": 2},
        "gate_up": {
            "BLOCK_M": 16,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "GROUP_M": 1,
            "num_warps": 4,
            "num_stages": 4,
        },
        "down": {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 1, "num_warps": 4, "num_stages": 4},
        "combine": {"FUSED_TOKENS": 32, "BLOCK_T": 1, "BLOCK_H": 1024, "num_warps": 4},
    },
    "x86": {
        "router": {"BLOCK_T": 16, "BLOCK_H": 64, "SPLIT_H": 1, "num_warps": 1, "num_stages": 1},
        "gate_up": {
            "BLOCK_M": 8,
            "BLOCK_N": 128,
            "BLOCK_K": 64,
            "GROUP_M": 64,
            "num_warps": 1,
            "num_stages": 1,
        },
        "down": {"BLOCK_M": 8, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 64, "num_warps": 1, "num_stages": 1},
        "combine": {"FUSED_TOKENS": 0, "BLOCK_T": 1, "BLOCK_H": 4096, "num_warps": 1},
    },
    "interpret": {
        "router": {"BLOCK_T": 64, "BLOCK_H": 2048, "SPLIT_H": 1, "num_warps": 4, "num_stages": 3},
        "gate_up": {
            "BLOCK_M": 16,
            "BLOCK_N": 512,
            "BLOCK_K": 2048,
            "GROUP_M": 8,
            "num_warps": 4,
            "num_stages": 3,
        },
        "down": {
            "BLOCK_M": 16,
            "BLOCK_N": 512,
            "BLOCK_K": 2048,
            "GROUP_M": 8,
            "num_warps": 4,
            "num_stages": 3,
        },
        "combine": {"FUSED_TOKENS": 32, "BLOCK_T": 64, "BLOCK_H": 2048, "num_warps": 4},
    },
}

launcher = Launcher(LAYER, CONFIGS)
forward = launcher.forward
route = launcher.route
experts = launcher.experts
launches = launcher.launches
workspace_bytes = launcher.workspace_bytes
