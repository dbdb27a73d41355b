"""The checker on cases computed by hand, the file format, and what is refused with which message."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.solvers.placement import Placement, PlacementProblem, evaluate, evaluate_all, identity, solve
from moecc.solvers.routing import Routing, assumed_routing


def trace(ids, experts, *, name="chat", weight=1.0):
    ids = np.array(ids, np.int16)
    return Routing(name, ids, experts, np.zeros(len(ids), np.int32), weight)


def placed(rows, *, devices, per_node, experts):
    table = np.array(rows, np.int32)
    return Placement(
        physical_to_logical=table,
        devices=devices,
        devices_per_node=per_node,
        slots_per_device=table.shape[1] // devices,
        num_experts=experts,
    )


def test_metrics_by_hand():
    # Devices: {0,1} {2,3} | {4,5} {6,7}; nodes of two devices. Layer 1 swaps experts 1 and 7.
    placement = placed([[0, 1, 2, 3, 4, 5, 6, 7], [0, 7, 2, 3, 4, 5, 6, 1]], devices=4, per_node=2, experts=8)
    routing = trace([[[0, 1, 2], [0, 1, 2]], [[0, 4, 6], [7, 0, 3]]], 8)
    metrics = evaluate(placement, routing, "migrate")
    # Layer 0: loads 3 1 1 1. Layer 1: experts 0 1 2 0 3 7 -> loads 3 2 0 1. Both have mean 1.5.
    assert metrics.imbalance == pytest.approx(2.0)
    # Devices: {0,1} and {0,2,3}; then {0,3,1} and {0,1}. Nodes: 1 and 2; then 2 and 1.
    assert metrics.fan_out == pytest.approx((2 + 3 + 3 + 2) / 4)
    assert metrics.node_fan_out == pytest.approx((1 + 2 + 2 + 1) / 4)
    # Token 0 lands on 0, then on 0 (a tie of 0, 1, 3). Token 1 on 0 (a tie), then on 0.
    assert metrics.hops == 0
    # Token 0: 0-0, 1-0, 2-2. Token 1: 0-7, 0-0, 6-none, 4-none.
    assert metrics.same_device_pairs == pytest.approx((3 + 2) / 18)
    assert evaluate(placement, routing, "home").hops == 0


def test_hops_and_node_hops_by_hand():
    placement = placed([[0, 1, 2, 3]] * 3, devices=4, per_node=2, experts=4)
    routing = trace([[[0], [1], [2]], [[3], [3], [0]]], 4)
    metrics = evaluate(placement, routing, "migrate")
    assert metrics.hops == pytest.approx(3 / 4)
    assert metrics.node_hops == pytest.approx(2 / 4)


def test_replicas_by_hand():
    # Expert 0 on devices 0 and 1; a token of 0 and 2 needs device 1 alone.
    placement = placed([[0, 1, 0, 2, 3, 1]], devices=3, per_node=1, experts=4)
    routing = trace([[[0, 2]], [[0, 1]], [[2, 3]], [[0, 3]]], 4)
    metrics = evaluate(placement, routing, "home")
    assert metrics.fan_out == pytest.approx((1 + 1 + 2 + 2) / 4)
    # Loads: expert 0: 3, 1: 1, 2: 2, 3: 2 -> 1.5 + .5, 1.5 + 2, 2 + .5; mean 8 / 3.
    assert metrics.imbalance == pytest.approx(3.5 / (8 / 3))


def test_greedy_cover_is_greedy():
    # Devices {0,1,2,9} {3,4,5,8} hold all of 0..5 in two; {1,2,3,4} is larger at first sight.
    placement = placed([[0, 1, 2, 9, 3, 4, 5, 8, 1, 2, 3, 4, 6, 7, 8, 9]], devices=4, per_node=4, experts=10)
    assert evaluate(placement, trace([[[0, 1, 2, 3, 4, 5]]], 10), "home").fan_out == 3


def test_balance_workload_and_pooled_differ():
    placement = placed([[0, 1]], devices=2, per_node=2, experts=2)
    opposite = [trace([[[0]], [[0]]], 2, name="a"), trace([[[1]]], 2, name="b", weight=3.0)]
    result = evaluate_all(placement, opposite, "home")
    assert result.imbalance("workload") == pytest.approx(2.0)
    # Loads 1/4 and 3/4 whatever the lengths of the traces.
    assert result.imbalance("pooled") == pytest.approx(1.5)
    assert result.workloads["a"].fan_out == 1


def problem(workloads=None, **options):
    workloads = workloads or (assumed_routing("uniform", layers=2, experts=8, top_k=2, tokens=20),)
    given = {"devices": 4, "devices_per_node": 2, "slots_per_device": 2} | options
    return PlacementProblem(workloads=tuple(workloads), **given)


BAD = [
    (
        {"slots_per_device": 1},
        "hold 4 experts, but the model has 8; hint: slots_per_device must be at least 2",
    ),
    ({"slots_per_device": 9}, "slots_per_device 9 is larger than experts 8"),
    ({"devices_per_node": 3}, "4 devices do not fill nodes of 3"),
    ({"devices": 0}, "devices is 0; hint: use 1 or more"),
    ({"max_imbalance": 0.9}, "max_imbalance 0.9 is impossible"),
    ({"max_imbalance": float("nan")}, "max_imbalance nan is impossible"),
    ({"time_limit_s": 0.0}, "time_limit_s 0.0 is not a positive number"),
    ({"seed": -1}, "seed -1 is negative"),
    ({"execution": "away"}, "execution 'away' is unknown; hint: execution must be home or migrate"),
    ({"objective": "cost"}, "objective 'cost' is unknown"),
    ({"workloads": [trace(np.zeros((0, 2, 2)), 8)]}, "workload 'chat': the trace is empty"),
    ({"workloads": [trace([[[0, 8]]], 8)]}, "expert id 8 is outside [0, 8)"),
    ({"workloads": [trace([[[0, -1]]], 8)]}, "expert id -1 is outside [0, 8)"),
    ({"workloads": [trace([[[3, 3]]], 8)]}, "token 0 chose an expert twice in layer 0"),
    ({"workloads": [trace([[[0, 1]]], 8, weight=0.0)]}, "weight 0.0 is not a positive number"),
    ({"workloads": [trace([[[0, 1]]], 8)] * 2}, "two workloads are named 'chat'"),
    ({"workloads": [trace([[[0, 1]]], 8), trace([[[0]]], 8, name="b")]}, "top_k is 1, but 2 in 'chat'"),
    ({"workloads": [trace([[[0, 1]]], 8), trace([[[0, 1]] * 2], 8, name="b")]}, "layers is 2, but 1"),
    ({"workloads": [trace([[[0, 1]]], 8), trace([[[0, 1]]], 9, name="b")]}, "num_experts is 9, but 8"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_problems_are_refused(options, message):
    with pytest.raises(InputError) as error:
        problem(**options)
    assert message in str(error.value)
    assert "; hint: " in str(error.value)


def test_no_workloads_are_refused():
    with pytest.raises(InputError, match="there are no workloads"):
        PlacementProblem(workloads=(), devices=1, devices_per_node=1, slots_per_device=1)


def test_a_placement_of_another_model_is_refused():
    with pytest.raises(InputError, match="the placement has 2 layers, the trace 3"):
        evaluate(
            identity(problem()), assumed_routing("uniform", layers=3, experts=8, top_k=2, tokens=5), "home"
        )


def test_json_round_trip():
    solution = solve(problem())
    text = solution.to_json({"fan_out": 1.5})
    data = json.loads(text)
    assert data["schema"] == "moecc.placement/1"
    assert data["certificate"]["status"] == solution.certificate.status
    assert data["report"] == {"fan_out": 1.5}
    again = Placement.from_json(text)
    assert np.array_equal(again.physical_to_logical, solution.placement.physical_to_logical)
    assert again.to_json() == solution.placement.to_json()


def edited(**changes):
    data = identity(problem()).to_json() | changes
    return json.dumps({key: value for key, value in data.items() if value is not None})


ROW = [0, 1, 2, 3, 4, 5, 6, 7]
BAD_FILES = [
    ("{\n  bad", "p.json:2:3: not valid JSON"),
    ("[]", "p.json: schema is 'list'"),
    (edited(schema="moecc.placement/9"), "p.json: schema is 'moecc.placement/9'"),
    (edited(devices=None), "p.json: devices is missing"),
    (edited(devices=True), "p.json: devices is True"),
    (edited(devices_per_node=3), "p.json: 4 devices do not fill nodes of 3"),
    (edited(slots_per_device=3), "p.json: physical_to_logical_map has shape [2, 8]"),
    (edited(physical_to_logical_map=[]), "physical_to_logical_map: it is missing or empty"),
    (edited(physical_to_logical_map=[ROW, ROW[1:]]), "physical_to_logical_map[1]: it is not a list as long"),
    (edited(physical_to_logical_map=[ROW, [0.5, *ROW[1:]]]), "physical_to_logical_map[1][0]: 0.5 is not"),
    (
        edited(physical_to_logical_map=[ROW, [*ROW[:7], 8]]),
        "physical_to_logical_map[1][7]: expert 8 is outside",
    ),
    (
        edited(physical_to_logical_map=[ROW, [*ROW[:7], 0]]),
        "physical_to_logical_map[1]: expert 7 has no slot",
    ),
    (
        edited(num_experts=7, physical_to_logical_map=[[0, 0, 1, 2, 3, 4, 5, 6]] * 2),
        "device 0 holds expert 0 twice",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files_are_refused(text, message):
    with pytest.raises(InputError) as error:
        Placement.from_json(text, where="p.json")
    assert message in str(error.value)
    assert str(error.value).startswith("p.json")
