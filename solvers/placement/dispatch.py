"""Which replica serves a token: what the dispatch rules of engines make of a placement's balance and fan-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecc.errors import MoeccError
from moecc.solvers.placement.check_reach import PAIRS, Ints, entries_of, starts
from moecc.solvers.placement.check_traffic import Floats, Mask, hosts, token_homes
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import Dispatch
from moecc.solvers.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Means over tokens and layers, workloads by their weight. imbalance: of each workload apart; pooled_imbalance:
    of their mixture. fan_out: distinct devices that compute for a token; remote_fan_out: but for its home."""

    imbalance: float
    pooled_imbalance: float
    fan_out: float
    remote_fan_out: float


def judge_dispatch(
    placement: Placement, workloads: Sequence[Routing], rule: Dispatch, seed: int = 0
) -> Dispatched:
    """The figures under a rule; every token-expert pair is served by one replica, drawn on its own by `fractions`.

    All but `random` are exact means; `random` is one seeded draw. Tokens without homes are homed evenly.
    """
    total = sum(routing.weight for routing in workloads)
    shares = [routing.weight / total for routing in workloads]
    held = [hosts(placement, layer) for layer in range(placement.layers)]
    rows: list[list[float]] = []
    pooled = np.zeros((placement.layers, placement.devices))
    for index, (routing, share) in enumerate(zip(workloads, shares, strict=True)):
        homes, loads, reach = token_homes(placement, routing), routing.loads(), []
        of_layer = np.zeros((placement.layers, placement.devices))
        for layer, hosting in enumerate(held):
            rng = np.random.default_rng([seed, index, layer]) if rule == "random" else None
            served = fractions(rule, hosting, loads[layer], placement.devices_per_node)
            of_layer[layer], row = _serve(served, routing.topk_ids[:, layer], homes, rng)
            reach.append(row)
        pooled += share * of_layer
        rows.append([_imbalance(of_layer), *np.mean(reach, axis=0)])
    if rule == "lp":
        mixture = sum(share * routing.loads() for share, routing in zip(shares, workloads, strict=True))
        for layer, hosting in enumerate(held):
            load = np.asarray(mixture)[layer]
            pooled[layer] = load @ fractions(rule, hosting, load, placement.devices_per_node)[0]
    imbalance, fan_out, remote = (np.array(shares) @ np.array(rows)).tolist()
    return Dispatched(
        imbalance=imbalance,
        pooled_imbalance=_imbalance(pooled),
        fan_out=fan_out,
        remote_fan_out=remote,
    )


def fractions(rule: Dispatch, held: Mask, loads: Floats, devices_per_node: int) -> Floats:
    """[homes, experts, devices]: the share of an expert's tokens of each home that each device serves.

    One home stands for all where the rule does not ask for it. held: [experts, devices]; loads: [experts].
    `even` and `random`: every replica alike. `nearest`: the home device's replica, else the replicas of its node
    alike, else all alike (SGLang's static dispatch). `lp`: as makes the fullest device emptiest (the LP of
    DeepSeek's LPLB, github.com/deepseek-ai/LPLB).
    """
    even: Floats = np.asarray(held / held.sum(axis=1, keepdims=True), np.float64)
    if rule in ("even", "random"):
        return even[None]
    if rule == "lp":
        return _least_peak(held, loads)[None]
    experts, devices = held.shape
    nodes = held.reshape(experts, -1, devices_per_node)
    near = np.repeat(nodes.any(axis=2), devices_per_node, axis=1)
    device = np.arange(devices)
    here = device[:, None] // devices_per_node == device // devices_per_node
    inside = held[None] & here[:, None]
    of_node = inside / np.maximum(1, inside.sum(axis=2, keepdims=True))
    served = np.where(near.T[:, :, None], of_node, even)
    return np.where(held.T[:, :, None], np.eye(devices)[:, None], served)


def _least_peak(held: Mask, loads: Floats) -> Floats:
    """Data: loads of experts, their holders. Variables: the load each holder serves, the peak. Minimise the peak."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("GLOP")
    peak = solver.NumVar(0.0, solver.infinity(), "peak")
    cells = {(int(e), int(d)): solver.NumVar(0.0, solver.infinity(), "") for e, d in np.argwhere(held)}
    for expert, load in enumerate(loads.tolist()):
        solver.Add(sum(cells[expert, int(d)] for d in np.flatnonzero(held[expert])) == load)
    for device in range(held.shape[1]):
        solver.Add(sum(cells[int(e), device] for e in np.flatnonzero(held[:, device])) <= peak)
    solver.Minimize(peak)
    status = solver.Solve()
    if status != pywraplp.Solver.OPTIMAL:
        raise MoeccError(
            f"GLOP ended with status {status} on a dispatch that always has a solution",
            where="placement",
            hint="this is a bug of moecc: please report it with the placement and the trace",
        )
    served = np.zeros(held.shape)
    for (expert, device), cell in cells.items():
        served[expert, device] = max(0.0, cell.solution_value())
    # Experts that no token chose are served anywhere.
    idle = served.sum(axis=1) <= 0
    served[idle] = held[idle]
    return np.asarray(served / served.sum(axis=1, keepdims=True))


def _serve(
    served: Floats,
    ids: NDArray[np.int16],
    homes: Ints | None,
    rng: np.random.Generator | None,
) -> tuple[Floats, tuple[float, float]]:
    """Device loads (fractions of all assignments), and (fan-out, remote fan-out), means over tokens."""
    devices = served.shape[2]
    if rng is not None:
        replicas = (served[0] > 0).sum(axis=1)
        nth = (rng.random(ids.shape) * replicas[ids]).astype(np.int64)
        drawn = np.nonzero(served[0])[1][(np.cumsum(replicas) - replicas)[ids] + nth]
        token, device = np.divmod(np.unique(np.arange(len(ids))[:, None] * devices + drawn), devices)
        reach = _reach(token, device, np.ones(len(token)), len(ids), devices, homes)
        return np.bincount(drawn.ravel(), minlength=devices) / ids.size, reach
    if len(served) == 1 or homes is None:
        parts = [
            _expected(table, ids, homes if len(served) == 1 else np.full(len(ids), home))
            for home, table in enumerate(served)
        ]
        weights = np.full(len(served), 1 / len(served))
    else:
        used = np.unique(homes)
        parts = [_expected(served[h], ids[homes == h], homes[homes == h]) for h in used]
        weights = np.array([(homes == h).mean() for h in used])
    loads = np.tensordot(weights, np.array([load for load, _ in parts]), 1)
    reach = weights @ np.array([row for _, row in parts])
    return np.asarray(loads), (float(reach[0]), float(reach[1]))


def _expected(
    table: Floats, ids: NDArray[np.int16], homes: Ints | None
) -> tuple[Floats, tuple[float, float]]:
    """As _serve, the exact mean; table: [experts, devices]."""
    devices, loads = table.shape[1], np.bincount(ids.ravel(), minlength=len(table)) @ table / ids.size
    counts = (table > 0).sum(axis=1)
    first, holder = np.cumsum(counts) - counts, np.nonzero(table)[1]
    step = max(1, PAIRS // (ids.shape[1] * int(counts.max())))
    parts = []
    for at in range(0, len(ids), step):
        chosen = ids[at : at + step].astype(np.int64)
        each, entries = entries_of(first, counts, chosen)
        token = np.repeat(np.repeat(np.arange(at, at + len(chosen)), chosen.shape[1]), each)
        order = np.argsort(token * devices + holder[entries], kind="stable")
        token, entries = token[order], entries[order]
        runs = starts(token, holder[entries])
        missed = np.multiply.reduceat(1 - table[table > 0][entries], runs)
        parts.append((token[runs], holder[entries[runs]], 1 - missed))
    token, device, reached = (np.concatenate(column) for column in zip(*parts, strict=True))
    return np.asarray(loads), _reach(token, device, reached, len(ids), devices, homes)


def _reach(
    token: Ints, device: Ints, reached: Floats, tokens: int, devices: int, homes: Ints | None
) -> tuple[float, float]:
    """reached: [pairs], the probability that the device computes for the token; other pairs have none."""
    fan_out = float(reached.sum() / tokens)
    if homes is None:
        return fan_out, fan_out * (1 - 1 / devices)
    return fan_out, fan_out - float(reached[device == homes[token]].sum() / tokens)


def _imbalance(loads: Floats) -> float:
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())
