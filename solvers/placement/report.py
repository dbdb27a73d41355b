"""What a placement is worth: on the tokens it was solved on and on others, beside identity, under both executions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from moecc.solvers.placement.cautions import cautions
from moecc.solvers.placement.check import Evaluation, evaluate_all, evaluate_under, objective_of
from moecc.solvers.placement.check_balance import imbalance_of
from moecc.solvers.placement.dispatch import judge_dispatch
from moecc.solvers.placement.homes import Unit, shuffle
from moecc.solvers.placement.moves import plan_moves
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import Execution, PlacementProblem
from moecc.solvers.routing import Routing

Figures = dict[str, Any]
EXECUTIONS: tuple[Execution, ...] = ("home", "migrate")
COSTS = {"home": "fan_out", "migrate": "hops"}
NOISE = 0.01
"""A workload that was solved for is called worse from here on: halves of a trace differ by about as much."""
NOUNS = {
    "fan_out": "devices per token",
    "link_cost": "cost of the links",
    "hops": "hops per token",
    "imbalance": "imbalance",
}


@dataclass(frozen=True, kw_only=True)
class PlacingReport:
    """Plain data: what JSON holds. `before` is the identity placement, `after` the one found.

    request: what was asked for, without the workloads. traces: tokens and sha256 of every workload, so that a file
    can be checked against the traces it was made from. before, after: held-out sequences under the requested
    execution: the weighted mean of the workloads' Metrics, `pooled_imbalance`, `balance_imbalance` (by the requested
    balance), `objective` (what was minimised), and the Metrics of each of `workloads`. in_sample: the same on the
    sequences that were solved on. executions: held-out figures under `home` and under `migrate`. affinity: a sentence
    for each on what inter-layer affinity is worth. layers: of each layer imbalance and fan-out. dispatch: held-out
    figures under the engine's rule for replicas, where there are any. homes: where they are chosen, by `unit`, of each
    workload the remote devices per token with random homes and with chosen ones, on held-out tokens. moves: from the
    placement in force, if there is one: a MovePlan, its moves as rows of layer, expert, source, target. memory: where
    the size of an expert is known, expert_bytes of one layer and device_bytes, what every device holds. unseen: of each
    workload the figures of a placement solved without it; empty where that was not done. warnings: what to know
    before using the placement.
    """

    request: Figures
    traces: dict[str, Figures]
    held_out_tokens: dict[str, int]
    before: Figures
    after: Figures
    in_sample: dict[str, Figures]
    executions: dict[str, dict[str, Figures]]
    affinity: dict[str, str]
    layers: list[Figures]
    dispatch: Figures = field(default_factory=dict)
    homes: Figures = field(default_factory=dict)
    moves: Figures = field(default_factory=dict)
    memory: Figures = field(default_factory=dict)
    unseen: list[Figures] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One placement: figures under each execution, in-sample ones, under the engine's rule for replicas, chosen homes.

    All but in_sample on held-out sequences. layers: [layers] of imbalance and fan-out.
    """

    placement: Placement
    executions: dict[Execution, Figures]
    in_sample: Figures
    dispatch: Figures
    homes: Figures
    layers: list[Figures]


def judge_one(problem: PlacementProblem, placement: Placement, homes: Unit | None = None) -> Judged:
    """On the whole traces of problem.workloads; nothing here comes from a solver.

    homes: what is sent to a home of its choice, None where homes are as the traces have them or random.
    """
    training, held_out = halves(problem)
    judged = evaluate_under(placement, held_out, EXECUTIONS, problem.links)
    home, under = (
        judged["home"],
        {execution: _under(problem, held_out, execution) for execution in EXECUTIONS},
    )
    imbalance = imbalance_of(placement, under["migrate"])
    home_imbalance = imbalance_of(placement, under["home"]) if under["home"].near else imbalance
    replicas = problem.slots > problem.num_experts
    return Judged(
        placement=placement,
        executions={
            "home": _figures(placement, under["home"], judged["home"], home_imbalance),
            "migrate": _figures(placement, under["migrate"], judged["migrate"], imbalance),
        },
        in_sample=figures(placement, replace(problem, workloads=training)),
        dispatch=asdict(judge_dispatch(placement, held_out, problem.dispatch, problem.seed))
        if replicas
        else {},
        homes=_homes(placement, homes, training, held_out) if homes else {},
        layers=[
            {"imbalance": imbalance, "fan_out": fan_out}
            for imbalance, fan_out in zip(home.layer_imbalance, home.layer_fan_out, strict=True)
        ],
    )


def judge(
    problem: PlacementProblem,
    before: Judged,
    after: Judged,
    *,
    layer_names: Sequence[int] | None = None,
) -> PlacingReport:
    """Every figure of the report but `unseen`. layer_names: the model's numbers of the layers, 0 and up otherwise."""
    held_out = halves(problem)[1]
    sides = {"before": before, "after": after}
    executions: dict[str, dict[str, Figures]] = {
        execution: {side: judged.executions[execution] for side, judged in sides.items()}
        for execution in EXECUTIONS
    }
    chosen = executions[problem.execution]
    in_sample = {side: judged.in_sample for side, judged in sides.items()}
    dispatch = {side: judged.dispatch for side, judged in sides.items()}
    return PlacingReport(
        request=request(problem),
        traces={routing.name: fingerprint(routing) for routing in problem.workloads},
        held_out_tokens={routing.name: len(routing.topk_ids) for routing in held_out},
        before=chosen["before"],
        after=chosen["after"],
        in_sample=in_sample,
        executions=executions,
        affinity=affinity(executions, problem.execution),
        layers=[
            {"layer": name} | {side: judged.layers[index] for side, judged in sides.items()}
            for index, name in enumerate(layer_names or range(problem.layers))
        ],
        dispatch={"rule": problem.dispatch, **dispatch} if after.dispatch else {},
        homes=after.homes,
        moves=moves(problem, after.placement),
        memory=memory(problem, after.placement),
        warnings=_warnings(problem, in_sample, chosen) + cautions(problem, in_sample),
        assumptions=sorted({routing.assumption for routing in problem.workloads} - {""}),
    )


def halves(problem: PlacementProblem) -> tuple[tuple[Routing, ...], tuple[Routing, ...]]:
    """The sequences to solve on and those to judge on, of every workload."""
    split = [routing.split() for routing in problem.workloads]
    return tuple(train for train, _ in split), tuple(score for _, score in split)


def figures(placement: Placement, problem: PlacementProblem) -> Figures:
    """The figures of one placement on all of problem.workloads."""
    evaluation = evaluate_all(placement, problem.workloads, problem.execution, problem.links)
    return _figures(placement, problem, evaluation, imbalance_of(placement, problem))


def _figures(
    placement: Placement, problem: PlacementProblem, evaluation: Evaluation, imbalance: float
) -> Figures:
    """imbalance: of the placement, by the problem's balance."""
    balanced = problem.objective == "load"
    return {
        **asdict(evaluation.mean),
        "pooled_imbalance": evaluation.pooled_imbalance,
        "balance_imbalance": imbalance,
        "objective": imbalance if balanced else objective_of(placement, problem, evaluation),
        "workloads": {name: asdict(metrics) for name, metrics in evaluation.workloads.items()},
    }


def _homes(
    placement: Placement, unit: Unit, training: Sequence[Routing], held_out: Sequence[Routing]
) -> Figures:
    chosen = {routing.name: shuffle(placement, training, routing, unit) for routing in held_out}
    return {
        "unit": unit,
        "workloads": {
            name: {"random": found.before, "chosen": found.after, "fullest": found.most}
            for name, found in chosen.items()
        },
    }


def moves(problem: PlacementProblem, after: Placement) -> Figures:
    """Empty without a placement in force."""
    if problem.in_force is None:
        return {}
    plan = plan_moves(problem.in_force, after, problem.expert_bytes)
    return {
        "experts": len(plan.moves),
        "moved_bytes": plan.moved_bytes,
        "peak_extra_bytes": plan.peak_extra_bytes,
        "rounds": list(plan.rounds),
        "schedule": [[move.layer, move.expert, move.source, move.target] for move in plan.moves],
    }


def memory(problem: PlacementProblem, placement: Placement) -> Figures:
    """Empty where the size of an expert is not known. Every slot holds an expert, so devices hold equally much."""
    if problem.expert_bytes == 0:
        return {}
    held = placement.layers * placement.slots_per_device * problem.expert_bytes
    return {"expert_bytes": problem.expert_bytes, "device_bytes": held}


def _under(
    problem: PlacementProblem, workloads: tuple[Routing, ...], execution: Execution
) -> PlacementProblem:
    """The problem under either execution; what it minimises may exist under its own alone."""
    if execution == problem.execution:
        return replace(problem, workloads=workloads)
    return replace(problem, workloads=workloads, execution=execution, objective="traffic")


def request(problem: PlacementProblem) -> Figures:
    """The problem as plain values, without its workloads and the placement in force."""
    values: Figures = {f.name: getattr(problem, f.name) for f in fields(problem)}
    plain: Figures = {k: v for k, v in values.items() if isinstance(v, str | int | float | None)}
    if problem.links is not None:
        links = problem.links
        plain["links"] = {
            "tiers": list(links.tiers),
            "tier": links.tier.tolist(),
            "cost": links.cost.tolist(),
        }
    if problem.step_cost is not None:
        cost = asdict(problem.step_cost)
        plain["step_cost"] = {k: list(v) if isinstance(v, tuple) else v for k, v in cost.items()}
    return plain


def fingerprint(routing: Routing) -> Figures:
    """What identifies a trace, whatever file it came from."""
    data = hashlib.sha256(np.ascontiguousarray(routing.topk_ids, np.int16).tobytes())
    data.update(np.ascontiguousarray(routing.sequence_ids, np.int32).tobytes())
    return {"tokens": len(routing.topk_ids), "weight": routing.weight, "sha256": data.hexdigest()}


def affinity(executions: Mapping[str, Mapping[str, Figures]], chosen: Execution) -> dict[str, str]:
    """What it is worth, under each execution, that a token's experts of one layer foretell those of the next."""
    home, migrate = executions["home"], executions["migrate"]
    reached = " -> ".join(f"{home[side]['fan_out']:.2f}" for side in ("before", "after"))
    hops = [migrate[side]["hops"] for side in ("before", "after")]
    pairs = [migrate[side]["same_device_pairs"] for side in ("before", "after")]
    change = (
        f"{abs(1 - hops[1] / hops[0]):.0%} {'fewer' if hops[1] <= hops[0] else 'more'}, " if hops[0] else ""
    )
    aim = "" if chosen == "migrate" else "; this placement was not solved for it"
    return {
        "home": "inter-layer affinity is worth nothing: a token returns to its home rank after every layer and pays for"
        f" the devices it reaches ({reached})",
        "migrate": f"inter-layer affinity is everything: {hops[0]:.3f} -> {hops[1]:.3f} hops per token and layer"
        f" transition ({change}{pairs[0]:.3f} -> {pairs[1]:.3f} of adjacent-layer expert pairs on one device){aim}",
    }


def traffic_figure(problem: PlacementProblem) -> str:
    """The figure that `traffic` minimises, one of NOUNS."""
    return "link_cost" if problem.linked else COSTS[problem.execution]


def worse(
    before: Mapping[str, float], after: Mapping[str, float], traffic: str, *, slack: float = 1e-9
) -> str:
    """Empty, or whether `after` is worse than identity in traffic (a figure of NOUNS) or imbalance by more than the
    share `slack`, with both values."""
    found = [
        f"{NOUNS[key]} {after[key]:.3f} against {before[key]:.3f}"
        for key in (traffic, "imbalance")
        if after[key] > before[key] * (1 + slack)
    ]
    return " and ".join(found)


def _warnings(
    problem: PlacementProblem, in_sample: Mapping[str, Figures], held_out: Mapping[str, Figures]
) -> list[str]:
    found = []
    for name, after in held_out["after"]["workloads"].items():
        if what := worse(held_out["before"]["workloads"][name], after, traffic_figure(problem), slack=NOISE):
            found.append(f"worse than identity on held-out sequences of {name!r}: {what}")
    cap, reached = problem.max_imbalance, held_out["after"]["balance_imbalance"]
    if cap is not None and reached > cap + 1e-9:
        solved = in_sample["after"]["balance_imbalance"]
        found.append(
            f"max_imbalance {cap:g} does not hold on held-out sequences: {reached:.3f}, and {solved:.3f} on those"
            " solved on"
        )
    return found
