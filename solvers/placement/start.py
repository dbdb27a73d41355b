"""Where a search begins: how many replicas every expert gets, and a first balanced assignment."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints, LayerLoads
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem


def identity(problem: PlacementProblem) -> Placement:
    """Slot p holds expert p modulo the number of experts, in every layer: what engines do without a placement."""
    row = np.arange(problem.slots, dtype=np.int32) % problem.num_experts
    return Placement(
        physical_to_logical=np.tile(row, (problem.layers, 1)),
        devices=problem.devices,
        devices_per_node=problem.devices_per_node,
        slots_per_device=problem.slots_per_device,
        num_experts=problem.num_experts,
    )


def replicate(loads: Floats, slots: int, devices: int) -> Ints:
    """The expert of every unit, int64 [slots], sorted: each spare slot goes to the expert that is heaviest per replica.

    loads: [experts]. The rule is DeepSeek EPLB's `replicate_experts`; an expert never gets more replicas than devices.
    """
    replicas = np.ones(len(loads), np.int64)
    for _ in range(slots - len(loads)):
        per_replica = np.where(replicas < devices, loads / replicas, -1.0)
        replicas[int(per_replica.argmax())] += 1
    return np.repeat(np.arange(len(loads)), replicas)


def balanced_start(table: LayerLoads, experts: Ints, slots_per_device: int) -> Ints:
    """The device of every unit, int64 [units]: experts in falling replica count, then load, each onto the emptiest
    devices, the least loaded first among those.

    Taking the most replicas first onto the emptiest devices never runs out of distinct devices (Gale-Ryser).
    """
    mean = table.shares @ table.per_unit(experts)
    first = np.unique(experts, return_index=True)[1]
    counts = np.diff(np.append(first, len(experts)))
    device_of = np.empty(len(experts), np.int64)
    free = np.full(table.devices, slots_per_device)
    loads = np.zeros(table.devices)
    for index in np.lexsort((-mean[first], -counts)):
        begin, count = first[index], counts[index]
        chosen = np.lexsort((loads, -free))[:count]
        device_of[begin : begin + count] = chosen
        free[chosen] -= 1
        loads[chosen] += mean[begin]
    return device_of


def gathered_start(ids: Ints, weight: Floats, experts: Ints, devices: int) -> Ints:
    """The device of every unit, int64 [units]: devices filled one by one with experts that tokens choose together.

    ids: [rows, top_k] experts, weight: [rows]. A device begins with the most chosen unit that is left and takes the
    unit most often chosen with what it holds. An expert with as many units left as devices must go on each of them.
    """
    together = _chosen_together(ids, weight, int(experts.max()) + 1)
    left = np.bincount(experts)
    loads = together.diagonal() / left
    members: list[list[int]] = []
    for device in range(devices):
        held: list[int] = []
        while len(held) < len(experts) // devices:
            pull = together[:, held].sum(axis=1) if held else loads
            must = left == devices - device
            open_ = np.where(left > 0, pull + must * 1e9, -1.0)
            open_[held] = -2.0
            held.append(int(open_.argmax()))
        left[held] -= 1
        members.append(held)
    return _units_on(members, experts)


def _chosen_together(ids: Ints, weight: Floats, num_experts: int) -> Floats:
    """[experts, experts]: the weight of rows that chose both; the diagonal is the weight that chose one."""
    pairs = ids[:, :, None] * num_experts + ids[:, None, :]
    summed = np.bincount(pairs.ravel(), np.repeat(weight, ids.shape[1] ** 2), minlength=num_experts**2)
    return np.asarray(summed.reshape(num_experts, num_experts), np.float64)


def _units_on(members: list[list[int]], experts: Ints) -> Ints:
    device_of = np.empty(len(experts), np.int64)
    next_unit = np.searchsorted(experts, np.arange(int(experts.max()) + 1))
    for device, held in enumerate(members):
        device_of[next_unit[held]] = device
        next_unit[held] += 1
    return device_of


def to_placement(problem: PlacementProblem, layers: list[tuple[Ints, Ints]]) -> Placement:
    """From (expert of every unit, device of every unit) per layer; a device lists its experts in rising order."""
    rows = [experts[np.lexsort((experts, device_of))] for experts, device_of in layers]
    return Placement(
        physical_to_logical=np.array(rows, np.int32),
        devices=problem.devices,
        devices_per_node=problem.devices_per_node,
        slots_per_device=problem.slots_per_device,
        num_experts=problem.num_experts,
    )
