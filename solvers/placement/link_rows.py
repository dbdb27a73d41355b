"""Link traffic of one layer's tokens: rows as in `traffic`, priced by the devices and nodes they reach."""

from __future__ import annotations

import numpy as np

from moecc.solvers.placement.balance import Floats, Ints
from moecc.solvers.placement.prices import Prices, link_prices, token_rows
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.traffic import HomeRows, Look, device_counts, distinct, home_rows, token_weights


class LinkRows(HomeRows):
    """What the copies of a row's token cost, in Prices.scale; the replicas are those of the greedy cover.

    home: [rows], the row of the price tables.
    """

    def __init__(
        self, ids: Ints, weight: Floats, experts: Ints, devices: int, prices: Prices, home: Ints
    ) -> None:
        super().__init__(ids, weight, experts, devices)
        self.prices, self.home = prices, home

    def look(self, rows: Ints, device_of: Ints) -> Look:
        prices, node_of = self.prices, self.prices.node_of
        items = self.chosen(rows, device_of)
        at = device_of[items]
        node = node_of[at]
        counts, nodes = device_counts(at, self.devices), device_counts(node, int(node_of[-1]))
        device_price, node_price = prices.device[self.home[rows]], prices.node[self.home[rows]]
        cost = (device_price * (counts > 0)).sum(axis=1) + (node_price * (nodes > 0)).sum(axis=1)
        entered = device_price * (counts == 0) + (node_price * (nodes == 0))[:, node_of]
        alone = np.take_along_axis(counts, at, 1) == 1
        last = np.take_along_axis(nodes, node, 1) == 1
        left = np.take_along_axis(device_price, at, 1) * alone
        left_node = np.take_along_axis(node_price, node, 1) * last
        moves = entered.astype(np.float32)[:, None, :] - left.astype(np.float32)[:, :, None]
        elsewhere = node_of != node[:, :, None]
        moves = moves - left_node.astype(np.float32)[:, :, None] * elsewhere
        return Look(items=items, cost=cost, moves=moves)

    def cost(self, device_of: Ints) -> float:
        sets = self.reached(device_of)
        nodes = distinct(self.prices.node_of[sets], int(self.prices.node_of[-1]))
        home = self.home[:, None]
        of_row = self.prices.device[home, sets].sum(axis=1) + self.prices.node[home, nodes].sum(axis=1)
        return float(self.weight @ of_row)


def traffic_rows(problem: PlacementProblem, layer: int, experts: Ints) -> HomeRows:
    """The rows that objective `traffic` counts under `home`."""
    return link_rows(problem, layer, experts) if problem.linked else home_rows(problem, layer, experts)


def link_rows(problem: PlacementProblem, layer: int, experts: Ints) -> LinkRows:
    """Identical top-k sets of one home as one row; weights as in home_rows."""
    ids = np.concatenate([np.sort(routing.topk_ids[:, layer], axis=1) for routing in problem.workloads])
    home = np.concatenate([token_rows(problem, index) for index in range(len(problem.workloads))])
    keyed = np.concatenate([home[:, None], ids.astype(np.int64)], axis=1)
    rows, inverse = np.unique(keyed, axis=0, return_inverse=True)
    weight = np.bincount(inverse.ravel(), token_weights(problem), minlength=len(rows)).astype(np.float64)
    prices = link_prices(problem)
    return LinkRows(rows[:, 1:].copy(), weight, experts, problem.devices, prices, rows[:, 0].copy())
