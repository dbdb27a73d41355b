"""Proven optima by enumeration: `step` layer by layer, `migrate` along the chain of layers."""

from __future__ import annotations

import itertools

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.enumerate import Holds, all_layers, cover, units_of
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.search import TOLERANCE
from moecc.solvers.placement.step import layer_us, rates, step_rows
from moecc.solvers.placement.traffic import token_weights

MAX_CELLS = 40_000_000
"""Entries of the largest table: a few seconds of work."""
CHUNK = 2000


def prove_steps(work: Work) -> None:
    """The best placement of each layer whose placements can all be looked at; not under a cap, which couples layers."""
    problem = work.problem
    if problem.max_imbalance is not None:
        return
    holds = all_layers(problem.num_experts, problem.devices, problem.slots_per_device)
    if holds is None:
        return
    for index, layer in enumerate(work.layers):
        rows = step_rows(problem, index, layer.experts)
        if len(holds) * rows.home.ids.size * problem.devices > MAX_CELLS * 10 or work.clock.passed(np.inf):
            continue
        before = layer_us(work, index)
        times = np.concatenate(
            [_step_times(work, index, holds[i : i + CHUNK]) for i in range(0, len(holds), CHUNK)]
        )
        best = int(times.argmin())
        work.exact_layers += 1
        work.bounds[index] = min(float(times[best]), before)
        if times[best] < before - TOLERANCE:
            layer.experts, layer.device_of = units_of(holds[best])
        work.tick(index + 1, problem.layers)


def _step_times(work: Work, index: int, holds: Holds) -> Floats:
    """[placements], us."""
    rate, table = rates(work.problem), work.layers[index].table
    rows = step_rows(work.problem, index, work.layers[index].experts)
    used = cover(holds, rows.home.ids)
    by_node = used.reshape(len(used), used.shape[1], -1, work.problem.devices_per_node).any(axis=3)
    replicas = holds.sum(axis=2)
    loads = np.einsum("re,ped->rpd", table.loads, holds / replicas[:, :, None])
    reach = np.einsum("sr,psd->rpd", rows.weight, used)
    node_reach = np.einsum("sr,psn->rpn", rows.weight, by_node)
    return rate.fixed + table.combine(rate.times(loads, reach, node_reach).max(axis=2))


def prove_chain(work: Work) -> bool:
    """The fewest hops over all layers by dynamic programming along them; False if that is too large.

    The state of a layer is where its tokens land: placements with equal landings are one.
    """
    problem = work.problem
    holds = all_layers(problem.num_experts, problem.devices, problem.slots_per_device)
    ids = np.concatenate([routing.topk_ids for routing in problem.workloads]).astype(np.int64)
    if holds is None or len(holds) * ids[:, 0].size * problem.devices > MAX_CELLS:
        return False
    weight = token_weights(problem)
    states = [_landings(holds, ids[:, layer]) for layer in range(problem.layers)]
    pairs = max(len(a) * len(b) for (a, _), (b, _) in itertools.pairwise(states))
    if pairs * len(ids) > MAX_CELLS * 10:
        return False
    cost, choices = np.zeros(len(states[0][0])), []
    for (before, _), (after, _) in itertools.pairwise(states):
        total = cost[:, None] + _hops(before, after, weight, problem.devices)
        choices.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    path = [int(cost.argmin())]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    for layer, (_, placements), state in zip(work.layers, states, reversed(path), strict=True):
        layer.experts, layer.device_of = units_of(holds[placements[state]])
    work.exact_layers = problem.layers
    work.proven = float(cost.min()) / (problem.layers - 1)
    return True


def _landings(holds: Holds, ids: Ints) -> tuple[Ints, Ints]:
    """Distinct landings [states, tokens], and one placement of each [states]."""
    counts = np.asarray(holds[:, ids].sum(axis=2))
    return np.unique(counts.argmax(axis=2), axis=0, return_index=True)


def _hops(before: Ints, after: Ints, weight: Floats, devices: int) -> Floats:
    """[states before, states after]: the weight of tokens that land elsewhere."""
    stay = np.zeros((len(before), len(after)))
    for device in range(devices):
        stay += ((before == device) * weight) @ (after == device).T
    return np.asarray(weight.sum() - stay)
