# mypy: ignore-errors
"""From hidden states to expert ids, weights, sorted order and tile map, in one launch.

Expert columns are padded per group, so that a group is one row of a reshaped tile: column = group * GROUP_PAD +
index in group. Columns and expert ids are in the same order, so ties fall to the lower id in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moecc.codegen.kernels.common import accumulate_dot, is_last_arrival, widen
from moecc.codegen.kernels.plan import count_before, finish_plan


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
