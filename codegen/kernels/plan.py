# mypy: ignore-errors
"""From counts per token block to the sorted order and the tile map that the expert GEMMs walk.

A slot is one assignment: slot = token * TOP_K + j. Rows are slots sorted by expert, stable in token order, without
padding. A tile is up to BLOCK_M rows of one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.common import is_last_arrival


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
