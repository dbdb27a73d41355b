"""The placement in force, carried over to the devices of a problem: the start that moves least, and labels that keep
experts where they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.moves import Held, holdings, widened
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem


def held_before(problem: PlacementProblem, in_force: Placement) -> Held:
    """[layers, experts, devices]: what the problem's devices hold already."""
    return widened(holdings(in_force), problem.devices)


def carried(problem: PlacementProblem, in_force: Placement) -> list[tuple[Ints, Ints]]:
    """(expert, device) of every unit per layer: the placement in force where the cluster is the same; else every
    device keeps what fits, and free slots take what no device holds any more, then replicas of the heaviest experts.
    """
    before = held_before(problem, in_force)
    loads = np.einsum("w,wle->le", problem.shares, np.stack([w.loads() for w in problem.workloads]))
    layers = []
    for held, load in zip(before, loads, strict=True):
        kept = _fill(_fit(held, load, problem.slots_per_device), load, problem.slots_per_device)
        experts, device_of = np.nonzero(kept)
        layers.append((experts.astype(np.int64), device_of.astype(np.int64)))
    return layers


def _fit(held: Held, load: Floats, width: int) -> Held:
    """What is kept: too full devices drop replicas, then light experts; replicas make room for what none holds."""
    kept = held.copy()
    for device in range(kept.shape[1]):
        while kept[:, device].sum() > width:
            here = np.flatnonzero(kept[:, device])
            kept[here[np.lexsort((load[here], -kept[here].sum(axis=1)))[0]], device] = False
    while (~kept.any(axis=1)).sum() > width * kept.shape[1] - kept.sum():
        replicas = kept.sum(axis=1)
        expert = int(np.lexsort((load, -replicas))[0])
        kept[expert, np.flatnonzero(kept[expert])[-1]] = False
    return kept


def _fill(kept: Held, load: Floats, width: int) -> Held:
    for expert in np.argsort(-load, kind="stable"):
        if not kept[expert].any():
            kept[expert, int(_by_room(kept, load, width)[0])] = True
    for device in _by_room(kept, load, width):
        while kept[:, device].sum() < width:
            per_replica = np.where(kept[:, device], -1.0, load / kept.sum(axis=1))
            kept[int(per_replica.argmax()), device] = True
    return kept


def _by_room(kept: Held, load: Floats, width: int) -> Ints:
    """Devices with the most free slots first, of those the least loaded; full ones last."""
    free = width - kept.sum(axis=0)
    loads = (load / np.maximum(1, kept.sum(axis=1))) @ kept
    return np.lexsort((loads, -free))


def match_devices(problem: PlacementProblem, in_force: Placement, new: Placement) -> Placement:
    """The same placement with its devices renamed so that they hold most of what they held before.

    Only renamings that the execution does not see: under `home` every layer's own, nodes staying together (where an
    expert has replicas, ties of the greedy cover may fall otherwise); of a `load` problem under `migrate` one for all
    layers; none where landings break ties by device number, links differ or tokens have homes.
    """
    if problem.execution == "migrate" and problem.objective != "load":
        return new
    if problem.links is not None or problem.homed:
        return new
    before, after = held_before(problem, in_force), holdings(new)
    shared = np.einsum("led,leo->ldo", after.astype(np.int64), before.astype(np.int64))
    if problem.execution == "migrate":
        shared = np.broadcast_to(shared.sum(axis=0), shared.shape)
    rows = []
    for layer, row in enumerate(new.physical_to_logical):
        name = names_by_node(shared[layer], problem.devices_per_node)
        renamed = np.empty_like(row).reshape(problem.devices, -1)
        renamed[name] = row.reshape(problem.devices, -1)
        rows.append(renamed.ravel())
    return Placement(
        physical_to_logical=np.array(rows, np.int32),
        devices=new.devices,
        devices_per_node=new.devices_per_node,
        slots_per_device=new.slots_per_device,
        num_experts=new.num_experts,
    )


def names_by_node(shared: NDArray[np.int64], devices_per_node: int) -> Ints:
    """[devices]: the old name of every new device; shared: [new devices, old devices] experts in common."""
    devices = len(shared)
    nodes = devices // devices_per_node
    if nodes == 1 or devices_per_node == 1:
        return best_assignment(shared)
    inner = {
        (n, o): best_assignment(block)
        for n in range(nodes)
        for o in range(nodes)
        if (block := _block(shared, n, o, devices_per_node)).any() or n == o
    }
    gains = np.zeros((nodes, nodes), np.int64)
    for (n, o), names in inner.items():
        gains[n, o] = _block(shared, n, o, devices_per_node)[np.arange(devices_per_node), names].sum()
    names = np.empty(devices, np.int64)
    within = np.arange(devices_per_node)
    for n, o in enumerate(best_assignment(gains).tolist()):
        names[n * devices_per_node + within] = o * devices_per_node + inner.get((n, o), within)
    return names


def _block(shared: NDArray[np.int64], new_node: int, old_node: int, size: int) -> NDArray[np.int64]:
    rows, columns = (
        slice(new_node * size, (new_node + 1) * size),
        slice(old_node * size, (old_node + 1) * size),
    )
    return shared[rows, columns]


def best_assignment(gains: NDArray[np.int64]) -> Ints:
    """[n]: the column of every row so that the gains [n, n] add up to the most; the diagonal if that is as good.

    OR-Tools' cost-scaling assignment (Goldberg and Kennedy, 1995).
    """
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    size = len(gains)
    solver, index = SimpleLinearSumAssignment(), np.arange(size)
    # A tie-break worth less than one unit of gain in all: experts in place stay there.
    costs = -(gains * (size + 1) + np.eye(size, dtype=np.int64))
    rows, columns = np.repeat(index, size), np.tile(index, size)
    solver.add_arcs_with_cost(rows, columns, costs.ravel())
    solver.solve()
    return np.array([solver.right_mate(i) for i in range(size)], np.int64)
