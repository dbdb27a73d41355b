"""What a token pays for each device and node that it reaches: the links of a problem, summed along the way it goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.links import TIER_COSTS
from moecc.solvers.placement.problem import PlacementProblem


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of one copy of a token, in units of `scale`, which makes a device and its node cost 1 in the mean.

    device: [homes, devices + 1]; node: [homes, nodes + 1], paid once by a token that reaches the node; the last
    column is the padding's and free. Row h is home h, the last row the mean over all homes, of tokens without one;
    alone where no token has a home. node_of: [devices + 1].
    """

    device: Floats
    node: Floats
    node_of: Ints
    scale: float

    @property
    def even(self) -> bool:
        """Whether device and node numbers do not matter, so that only counts do."""
        device, node = self.device[:, :-1], self.node[:, :-1]
        return len(device) == 1 and bool(np.ptp(device) < 1e-12 and np.ptp(node) < 1e-12)


def link_prices(problem: PlacementProblem) -> Prices:
    """A home sends to each device of its own node, and once to each other node: to the device of its local rank, which
    forwards to the others (DeepEP, github.com/deepseek-ai/DeepEP)."""
    size, per_node = problem.devices, problem.devices_per_node
    node = np.arange(size) // per_node
    if problem.links is None and not problem.homed:
        _, near, far = TIER_COSTS
        nodes = size // per_node
        device_price = np.full((1, size), near * (per_node - 1) / per_node)
        node_price = np.full((1, nodes), far * (nodes - 1) / nodes)
    else:
        device_price, node_price = _by_home(problem)
    mean = float(device_price[-1].mean() + node_price[-1].mean())
    scale = mean if mean > 0 else 1.0
    return Prices(
        device=np.pad(device_price / scale, ((0, 0), (0, 1))),
        node=np.pad(node_price / scale, ((0, 0), (0, 1))),
        node_of=np.append(node, size // per_node),
        scale=scale,
    )


def _by_home(problem: PlacementProblem) -> tuple[Floats, Floats]:
    """[homes + 1, devices] and [homes + 1, nodes], the mean last; the mean alone without homes."""
    size, per_node = problem.devices, problem.devices_per_node
    device = np.arange(size)
    node, local, nodes = device // per_node, device % per_node, np.arange(size // per_node)
    if problem.links is not None:
        cost = problem.links.cost
    else:
        cost = np.where(node[:, None] == node, TIER_COSTS[1], TIER_COSTS[2])
        np.fill_diagonal(cost, TIER_COSTS[0])
    relay = np.where(node[:, None] == node, device[:, None], node * per_node + local[:, None])
    to_device = cost[relay, device]
    entry = nodes * per_node + local[:, None]
    to_node = np.where(node[:, None] == nodes, 0.0, cost[device[:, None], entry])
    mean = to_device.mean(axis=0, keepdims=True), to_node.mean(axis=0, keepdims=True)
    if not problem.homed:
        return mean
    return np.concatenate([to_device, mean[0]]), np.concatenate([to_node, mean[1]])


def least_link_cost(problem: PlacementProblem) -> float:
    """No placement's link cost per token and layer is below this: each token's fewest devices at the least prices."""
    prices, devices = link_prices(problem), -(-problem.top_k // problem.slots_per_device)
    nodes = -(-devices // problem.devices_per_node)
    least = np.sort(prices.device[:, :-1], axis=1)[:, :devices].sum(axis=1)
    least = least + np.sort(prices.node[:, :-1], axis=1)[:, :nodes].sum(axis=1)
    homes = [token_rows(problem, index) for index in range(len(problem.workloads))]
    parts = [share * float(least[rows].mean()) for share, rows in zip(problem.shares, homes, strict=True)]
    return prices.scale * float(np.sum(parts))


def token_rows(problem: PlacementProblem, workload: int) -> Ints:
    """[tokens]: the row of Prices that a workload's tokens pay by."""
    routing = problem.workloads[workload]
    if routing.homes is not None:
        return routing.homes.astype(np.int64)
    return np.full(len(routing.topk_ids), problem.devices if problem.homed else 0)
