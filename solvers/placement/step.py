"""Predicted layer time under `home`: the slowest device, in the price of every swap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecc.solvers.placement.balance import DeviceLoads, Floats, Ints, LayerLoads
from moecc.solvers.placement.bounds import lower_bound
from moecc.solvers.placement.home import shaken
from moecc.solvers.placement.layers import Work
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.search import TOLERANCE, reduce_cost
from moecc.solvers.placement.start import gathered_start
from moecc.solvers.placement.traffic import HomeRows

ROUNDS = 3
EVENNESS = 0.02
"""Weight of the sum of squares beside the maximum: most swaps leave the slowest device as it is."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """us of a device: load (1 = the mean device's) * per_load + share of tokens that reach it * per_reach [devices]
    + share of tokens that reach its node * per_node [devices]. fixed: of every layer."""

    per_load: float
    per_reach: Floats
    per_node: Floats
    node_of: Ints
    fixed: float

    def times(self, loads: Floats, reach: Floats, node_reach: Floats) -> Floats:
        """[..., devices] from [..., devices] twice and [..., nodes]."""
        return np.asarray(
            self.per_load * loads + self.per_reach * reach + self.per_node * node_reach[..., self.node_of]
        )


def rates(problem: PlacementProblem) -> Rates:
    """What the links charge a device on average over all homes.

    A home sends to each device of its own node, and once to each other node: to the device of its local rank, which
    forwards to the others.
    """
    cost, size, per_node = problem.step_cost, problem.devices, problem.devices_per_node
    assert cost is not None, "PlacementProblem lets no step without its cost pass"
    links = problem.links or Links.by_node(size, per_node)
    price = links.cost
    if cost.us_per_byte_by_tier is not None:
        price = np.array(cost.us_per_byte_by_tier)[links.tier]
    price = np.where(np.eye(size, dtype=np.bool_), 0.0, price) * cost.tokens * cost.bytes_per_token / size
    device = np.arange(size)
    node, local = device // per_node, device % per_node
    inside = node[:, None] == node
    relay = np.where(inside, device[:, None], node * per_node + local[:, None])
    crossing = ~inside & (local[:, None] == local)
    return Rates(
        per_load=cost.compute_us_per_row * cost.tokens * problem.top_k / size,
        per_reach=price[relay, device].sum(axis=0),
        per_node=np.where(crossing, price, 0.0).sum(axis=0),
        node_of=node,
        fixed=cost.fixed_us,
    )


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Distinct top-k sets of a layer. weight: [sets, rows of the load table], every column sums to 1."""

    home: HomeRows
    weight: Floats


def step_rows(problem: PlacementProblem, layer: int, experts: Ints) -> StepRows:
    """One column per workload, or one for their mixture if balance is pooled."""
    ids = [np.sort(routing.topk_ids[:, layer], axis=1) for routing in problem.workloads]
    sets, inverse = np.unique(np.concatenate(ids).astype(np.int64), axis=0, return_inverse=True)
    parts = np.split(inverse.ravel(), np.cumsum([len(part) for part in ids])[:-1])
    weight = np.stack([np.bincount(part, minlength=len(sets)) / len(part) for part in parts], axis=1)
    if problem.balance == "pooled":
        weight = weight @ problem.shares[:, None]
    return StepRows(home=HomeRows(sets, weight.sum(axis=1), experts, problem.devices), weight=weight)


class _Reach:
    """Share of tokens that reach each group of devices, and its change at a unit's group in every swap.

    A swap of u (group a) with v (group b) brings a the sets with v and nothing on a, and takes those where u is alone
    on a, but for those that have v as well: gain[v, a] - lost[u] + both[u, v]. All with the rows of the load table
    first; items: [sets, top_k] units. Sums are scattered, not multiplied: BLAS threads cost more than they bring here.
    """

    def __init__(self, items: Ints, weight: Floats, group_of: Ints, groups: int) -> None:
        self.weight, self.groups = weight, groups
        shape = (weight.shape[1], len(group_of))
        self.reach = np.zeros((shape[0], groups))
        self.gain = np.zeros((*shape, groups))
        self.lost = np.zeros(shape)
        self.both = np.zeros((*shape, shape[1]))
        self.add(np.arange(len(items)), items, group_of, 1.0)

    def add(self, sets: Ints, items: Ints, group_of: Ints, sign: float) -> None:
        """items: of these sets, [sets, top_k]."""
        at, (rows, units) = group_of[items], self.lost.shape
        flat = np.arange(len(items))[:, None] * self.groups + at
        counts = np.bincount(flat.ravel(), minlength=len(items) * self.groups).reshape(-1, self.groups)
        alone, absent = np.take_along_axis(counts, at, 1) == 1, counts == 0
        others = items[:, :, None] * self.groups + np.arange(self.groups)
        joint = items[:, :, None] * units + items[:, None, :]
        for row in range(rows):
            weight = sign * self.weight[sets, row]
            lone = alone * weight[:, None]
            self.reach[row] += (~absent * weight[:, None]).sum(axis=0)
            self.lost[row] += np.bincount(items.ravel(), lone.ravel(), minlength=units)
            _scatter(
                self.gain[row], others, np.broadcast_to((absent * weight[:, None])[:, None], others.shape)
            )
            _scatter(self.both[row], joint, np.broadcast_to(lone[:, :, None], joint.shape))

    def changes(self, group_of: Ints) -> Floats:
        """[rows, u, v]: at the group of u if u and v change places."""
        moved = self.gain[:, :, group_of].transpose(0, 2, 1) - self.lost[:, :, None] + self.both
        return np.where(group_of[:, None] == group_of, 0.0, moved)


def _scatter(table: Floats, cells: Ints, values: Floats) -> None:
    table += np.bincount(cells.ravel(), values.ravel(), minlength=table.size).reshape(table.shape)


class StepSwaps:
    """The predicted time of a layer under every swap of two units (the Swaps of `reduce_cost`).

    With replicas the units that a set uses are those of the greedy cover under the present assignment, so a change is
    an estimate; without it is exact. Prices of links that differ within a node enter a change by their mean.
    """

    def __init__(self, rows: StepRows, table: LayerLoads, rate: Rates, device_of: Ints) -> None:
        self.rows, self.table, self.rate = rows, table, rate
        self.device_of = np.append(device_of, rows.home.devices)
        self.loads = DeviceLoads(table, rows.home.experts, device_of)
        holds = [np.flatnonzero((rows.home.ids == e).any(axis=1)) for e in range(table.loads.shape[1])]
        self.holders = [holds[expert] for expert in rows.home.experts]
        self.items = rows.home.look(np.arange(len(rows.home.ids)), self.device_of).items.copy()
        nodes = int(rate.node_of.max()) + 1
        self.devices = _Reach(self.items, rows.weight, device_of, rows.home.devices)
        self.nodes = _Reach(self.items, rows.weight, rate.node_of[device_of], nodes)
        self.node_rate = np.bincount(rate.node_of, rate.per_node) / np.bincount(rate.node_of)

    @property
    def times(self) -> Floats:
        """[rows of the load table, devices], us."""
        return self.rate.times(self.loads.sums, self.devices.reach, self.nodes.reach)

    @property
    def cost(self) -> float:
        return float(self.table.combine(self.times.max(axis=1)))

    def changes(self) -> Floats:
        """[units, units]; entries of pairs on one device mean nothing."""
        at, rate, times = self.device_of[:-1], self.rate, self.times
        node = rate.node_of[at]
        load = self.loads.unit[:, None, :] - self.loads.unit[:, :, None]
        at_node = self.nodes.changes(node) * self.node_rate[node][:, None]
        here = times[:, at][:, :, None] + rate.per_load * load + at_node
        here = here + self.devices.changes(at) * rate.per_reach[at][:, None]
        there = here.transpose(0, 2, 1)
        peak = np.maximum(np.maximum(here, there), self._others(times, at, node, at_node))
        squares = here**2 - times[:, at][:, :, None] ** 2
        even = np.tensordot(self.table.shares, squares + squares.transpose(0, 2, 1), 1) / times.mean()
        return np.asarray(self.table.combine(peak) - self.cost + EVENNESS * even / 2)

    def swap(self, u: int, v: int) -> None:
        at = self.device_of
        sets = np.union1d(self.holders[u], self.holders[v])
        self._count(sets, -1.0)
        self.loads.swap(u, v, int(at[u]), int(at[v]))
        at[u], at[v] = at[v], at[u]
        # Gains and losses are by the groups of all units: the moved ones must be in place before sets are counted.
        self.items[sets] = self.rows.home.look(sets, at).items
        self._count(sets, 1.0)

    def _count(self, sets: Ints, sign: float) -> None:
        at, items = self.device_of[:-1], self.items[sets]
        self.devices.add(sets, items, at, sign)
        self.nodes.add(sets, items, self.rate.node_of[at], sign)

    def _others(self, times: Floats, at: Ints, node: Ints, at_node: Floats) -> Floats:
        """[rows, u, v]: the slowest device but those of u and v, after the swap."""
        by_node = times.reshape(len(times), -1, int((self.rate.node_of == 0).sum()))
        beside = _without_one(by_node).reshape(times.shape)[:, at][:, :, None] + at_node
        apart = np.maximum(beside, beside.transpose(0, 2, 1))
        far = _without_two(by_node.max(axis=2))[:, node[:, None], node]
        same = _without_two(times)[:, at[:, None], at]
        return np.where(node[:, None] == node, same, np.maximum(apart, far))


def _without_one(values: Floats) -> Floats:
    """[..., n]: the largest of the other entries; -inf if there is none."""
    padded = np.concatenate([values, np.full((*values.shape[:-1], 1), -np.inf)], axis=-1)
    top = np.sort(padded, axis=-1)
    first = values == top[..., -1:]
    return np.where(first, top[..., -2:-1], top[..., -1:])


def _without_two(values: Floats) -> Floats:
    """[rows, i, j]: the largest entry of each row but i and j; -inf if there is none."""
    padded = np.concatenate([values, np.full((len(values), 2), -np.inf)], axis=1)
    order = np.argsort(-padded, axis=1, kind="stable")[:, :3]
    first, second, third = (np.take_along_axis(padded, order[:, [i]], 1)[:, :, None] for i in range(3))
    index = np.arange(values.shape[1])
    hit_first, hit_second = (
        (index == order[:, [i]])[:, :, None] | (index == order[:, [i]])[:, None, :] for i in range(2)
    )
    return np.where(~hit_first, first, np.where(~hit_second, second, third))


def search_step(work: Work) -> None:
    """Tabu search on every layer: from where it stands, from experts gathered by co-occurrence, from a shaken best."""
    problem, rate = work.problem, rates(work.problem)
    total = ROUNDS * len(work.layers)
    costs = [np.inf] * len(work.layers)
    for step in range(total):
        if work.clock.passed(np.inf):
            return
        round_, index = divmod(step, len(work.layers))
        layer = work.layers[index]
        rows = step_rows(problem, index, layer.experts)
        rng = work.rng(index, 1 + round_)
        begin = layer.device_of
        if round_ == 1:
            begin = gathered_start(rows.home.ids, rows.home.weight, layer.experts, problem.devices)
        elif round_ == 2:
            begin = shaken(layer, rng)
        found = reduce_cost(
            StepSwaps(rows, layer.table, rate, begin),
            layer.experts,
            layer.table,
            cap=float(work.caps[index]),
            budget=5 * problem.slots,
            rng=rng,
            clock=work.clock,
            until=work.clock.slice(total - step),
        )
        if found is not None and found.cost < costs[index] - TOLERANCE:
            costs[index], layer.device_of = found.cost, found.device_of
        work.tick(step + 1, total)


def layer_us(work: Work, index: int) -> float:
    """The predicted time of a layer as it stands."""
    layer, rate = work.layers[index], rates(work.problem)
    rows = step_rows(work.problem, index, layer.experts)
    device_of = np.append(layer.device_of, work.problem.devices)
    look = rows.home.look(np.arange(len(rows.home.ids)), device_of)
    used = np.zeros((len(look.items), work.problem.devices))
    np.put_along_axis(used, layer.device_of[look.items], 1.0, 1)
    by_node = used.reshape(len(used), -1, work.problem.devices_per_node).max(axis=2)
    loads = DeviceLoads(layer.table, layer.experts, layer.device_of).sums
    times = rate.times(loads, rows.weight.T @ used, rows.weight.T @ by_node)
    return rate.fixed + float(layer.table.combine(times.max(axis=1)))


def least_us(work: Work) -> list[float]:
    """No placement's time of a layer is below this: the compute bound, or mean work and the fewest copies."""
    problem, rate = work.problem, rates(work.problem)
    fewest = -(-problem.top_k // problem.slots_per_device)
    spread = rate.per_load + (rate.per_reach.min() * fewest + _node_price(rate)) / problem.devices
    return [
        rate.fixed + max(spread, rate.per_load * lower_bound(layer.table, problem.slots_per_device))
        for layer in work.layers
    ]


def _node_price(rate: Rates) -> float:
    """A token reaches at least one node: what that costs all of the node's devices together."""
    return float(np.bincount(rate.node_of, rate.per_node).min())
