"""When every byte moves: communication, the token chunks that hide it, and the order on both streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from moecc.errors import InputError
from moecc.hardware.load import load_device
from moecc.hardware.spec import Cluster
from moecc.ir.core import Function, Module, Op, Value
from moecc.ir.ops import AllGather, AllToAll, Attention, Concat, Split
from moecc.ir.types import WeightsType
from moecc.passes.costs import Phase, Situation, op_latency_us, stream_of
from moecc.passes.manager import Context
from moecc.passes.routed_path import RoutedPath, routed_path
from moecc.passes.settings import Settings, section, settings_of
from moecc.solvers.schedule import ScheduleProblem, Task, best_split, schedule_json

SPLITS = (1, 2, 4)
MEASURED = ("fan_out", "node_fan_out", "hops", "node_hops", "imbalance")
SOLVE_LIMIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How experts are spread over devices, as the placement measured it on held-out tokens."""

    devices: int
    nodes: int
    slots: int
    fan_out: float
    node_fan_out: float
    hops: float
    node_hops: float
    imbalance: float
    execution: str

    def remote(self, direction: str) -> tuple[float, float]:
        """Mean copies of a token that leave its device, and its node, in an exchange.

        `home`: a token's home is any device alike. `migrate`: before a dispatch it is where most of its experts of
        the layer before were, which is one of its devices unless it hops; a combine ends on one of its devices.
        """
        if self.execution == "home":
            others, other_nodes = 1 - 1 / self.devices, 1 - 1 / self.nodes
            return self.fan_out * others, self.node_fan_out * other_nodes
        hops, node_hops = (self.hops, self.node_hops) if direction == "dispatch" else (0.0, 0.0)
        return max(self.fan_out - 1 + hops, 0.0), max(self.node_fan_out - 1 + node_hops, 0.0)


class Overlap:
    """Contract: every function becomes one for each phase of serving, with `phase`, `tokens` (of one device) and
    `schedule` as attributes. Where a placement stands, dispatch and combine are enclosed in all-to-alls, expert
    weights are those of one device's slots, and the routed path runs in as many token chunks as the schedule
    found best; ops stand in the order of their start times. Under `migrate` the new KV entries are gathered.

    Pseudo-code: for every phase: build the function with 1, 2 and 4 chunks; ask the hardware for the latency of
    every op; schedule each on a compute and a communication stream; keep the one that ends first, the fewer
    chunks if equal.
    """

    name = "overlap"

    def run(self, module: Module, context: Context) -> None:
        settings = settings_of(module)
        for function in module.functions:
            if "phase" in function.attributes:
                hint = "run 'overlap' once, on what 'place' wrote"
                raise InputError(f"@{function.name} has a phase already", where=function.location, hint=hint)
        cluster = Cluster(
            device=load_device(settings.device),
            nodes=settings.nodes,
            devices_per_node=settings.devices_per_node,
        )
        spread = _spread(module, settings)
        phases: tuple[tuple[Phase, int], ...] = (("decode", settings.decode), ("prefill", settings.prefill))
        module.functions = [
            _scheduled(function, phase, tokens, cluster, spread)
            for function in module.functions
            for phase, tokens in phases
        ]


def _spread(module: Module, settings: Settings) -> Spread | None:
    if settings.devices == 1 or not any(routed_path(function) for function in module.functions):
        return None
    if "placement" not in module.attributes:
        where, hint = f"module @{module.name}", "run the pass 'place' before 'overlap'"
        raise InputError("experts have no placement", where=where, hint=hint)
    placement = section(module, "placement")
    try:
        after = placement["report"]["after"]
        measured = {key: float(after[key]) for key in MEASURED}
        slots = int(placement["slots_per_device"])
    except (KeyError, TypeError, ValueError) as error:
        where, hint = f"module @{module.name}", "use the placement that the pass 'place' wrote"
        raise InputError(f"attribute placement lacks {error}", where=where, hint=hint) from None
    return Spread(
        devices=settings.devices,
        nodes=settings.nodes,
        slots=slots,
        execution=settings.execution,
        **measured,
    )


def _scheduled(
    function: Function, phase: Phase, tokens: int, cluster: Cluster, spread: Spread | None
) -> Function:
    path = routed_path(function)
    situation = Situation(
        phase=phase,
        tokens=tokens,
        cluster=cluster,
        top_k=path.route.top_k if path else 1,
        imbalance=spread.imbalance if spread else 1.0,
    )
    splits = SPLITS if spread and path else SPLITS[:1]
    candidates = {chunks: distribute(function, chunks, spread) for chunks in splits if tokens % chunks == 0}
    problems = {chunks: _problem(candidate, situation) for chunks, candidate in candidates.items()}
    decision = best_split(problems, time_limit_s=SOLVE_LIMIT_S)
    chosen, schedule = candidates[decision.chunks], decision.schedule
    names = _task_names(chosen.ops)
    order = {id(op): (schedule.starts_us.get(names[id(op)], 0.0), i) for i, op in enumerate(chosen.ops)}
    for op in chosen.ops:
        op.attributes["tasks"] = [names[id(op)]] if names[id(op)] in schedule.starts_us else []
    chosen.ops = _in_order(chosen.ops, order)
    chosen.name = f"{function.name}_{phase}"
    chosen.attributes |= {
        "phase": phase,
        "tokens": tokens,
        "schedule": schedule_json(problems[decision.chunks], schedule, decision=decision),
    }
    return chosen


def _in_order(ops: Sequence[Op], order: dict[int, tuple[float, int]]) -> list[Op]:
    """By start time; an op that costs nothing stands behind the last of its inputs."""
    ready: dict[int, tuple[float, int]] = {}
    for op in ops:
        inputs = [ready[id(v.op)] for v in op.all_operands if v.op is not None]
        ready[id(op)] = max([order[id(op)], *((start, order[id(op)][1]) for start, _ in inputs)])
    return sorted(ops, key=lambda op: ready[id(op)])


def _task_names(ops: Sequence[Op]) -> dict[int, str]:
    names: dict[int, str] = {}
    counts: dict[str, int] = {}
    for op in ops:
        label = f"{op.mnemonic}.{op.attributes['direction']}" if isinstance(op, AllToAll) else op.mnemonic
        counts[label] = counts.get(label, 0) + 1
        names[id(op)] = f"{label}.{counts[label] - 1}"
    return names


def _problem(function: Function, situation: Situation) -> ScheduleProblem:
    """One task for every op that costs time; an op that costs none passes its dependencies on.

    An op is of a chunk if there are several of its kind.
    """
    names = _task_names(function.ops)
    behind: dict[int, tuple[str, ...]] = {}
    tasks = []
    for op in function.ops:
        sources = [behind[id(v.op)] for v in op.all_operands if v.op is not None]
        after = tuple(sorted({name for source in sources for name in source}))
        duration = op_latency_us(op, situation)
        behind[id(op)] = (names[id(op)],) if duration > 0 else after
        if duration > 0:
            task = Task(
                name=names[id(op)],
                stream=stream_of(op),
                duration_us=duration,
                after=after,
                chunk=_chunk(names[id(op)], names),
            )
            tasks.append(task)
    return ScheduleProblem(tasks=tuple(tasks))


def _chunk(name: str, names: dict[int, str]) -> int | None:
    kind, _, number = name.rpartition(".")
    return int(number) if f"{kind}.1" in names.values() else None


def distribute(function: Function, chunks: int, spread: Spread | None) -> Function:
    """The function with its routed path in `chunks` token chunks and, given a spread, with communication."""
    path = routed_path(function)
    arguments = [Value(a.name, a.type) for a in function.arguments]
    values = dict(zip(function.arguments, arguments, strict=True))
    new = Function(function.name, arguments, attributes=dict(function.attributes), location=function.location)
    if path and spread:
        _keep_local_weights(path, values, spread.slots)
    routed = set(map(id, vars(path).values())) if path else set()
    for op in function.ops:
        if path and op is path.combine:
            values[path.combine.combined] = _routed_chunks(new, path, values, chunks, spread)
        elif id(op) not in routed:
            if isinstance(op, Attention) and spread and spread.execution == "migrate":
                values[op.x] = _gather_context(new, op, values, spread)
            _append(new, op, values)
    new.returns = [values[value] for value in function.returns]
    return new


def _append(function: Function, op: Op, values: dict[Value, Value]) -> Op:
    new = op.rebuilt(values)
    function.ops.append(new)
    values.update(zip(op.all_results, new.all_results, strict=True))
    return new


def _keep_local_weights(path: RoutedPath, values: dict[Value, Value], slots: int) -> None:
    """A device holds the weights of its own slots."""
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        for old in path.experts.operands.get(name, ()):
            whole = cast(WeightsType, old.type)
            values[old].type = WeightsType((slots, *whole.shape[1:]), whole.dtype)


def _gather_context(
    function: Function, attention: Attention, values: dict[Value, Value], spread: Spread
) -> Value:
    gather = AllGather(
        {"x": values[attention.x]},
        {"devices": spread.devices, "bytes_per_token": attention.kv_bytes_per_token},
        location=attention.location,
    )
    function.ops.append(gather)
    return gather.gathered


def _routed_chunks(
    function: Function, path: RoutedPath, values: dict[Value, Value], chunks: int, spread: Spread | None
) -> Value:
    x, location = values[path.gate.x], path.combine.location
    if chunks == 1:
        return _routed_chunk(function, path, {**values, path.gate.x: x}, spread)
    split = Split({"x": x}, {"chunks": chunks}, location=location)
    function.ops.append(split)
    parts = [_routed_chunk(function, path, {**values, path.gate.x: part}, spread) for part in split.parts]
    concat = Concat({"parts": parts}, location=location)
    function.ops.append(concat)
    return concat.whole


def _routed_chunk(
    function: Function, path: RoutedPath, values: dict[Value, Value], spread: Spread | None
) -> Value:
    """Gate, route, (to the experts' devices,) dispatch, experts, combine (, and home) for one chunk."""
    _append(function, path.gate, values)
    _append(function, path.route, values)
    home = values[path.route.routing]
    if spread:
        there = _exchange(function, "dispatch", values[path.dispatch.x], home, spread, path.dispatch)
        values[path.dispatch.x] = there.received
        values[path.route.routing] = cast(Value, there.local_routing)
    for op in (path.dispatch, path.experts, path.combine):
        _append(function, op, values)
    if not spread:
        return values[path.combine.combined]
    return _exchange(function, "combine", values[path.combine.combined], home, spread, path.combine).received


def _exchange(
    function: Function, direction: str, x: Value, routing: Value, spread: Spread, origin: Op
) -> AllToAll:
    remote_devices, remote_nodes = spread.remote(direction)
    attributes = {
        "direction": direction,
        "devices": spread.devices,
        "slots": spread.slots,
        "fan_out": spread.fan_out,
        "remote_devices": remote_devices,
        "remote_nodes": remote_nodes,
    }
    op = AllToAll({"x": x, "routing": routing}, attributes, location=origin.location)
    function.ops.append(op)
    return op
