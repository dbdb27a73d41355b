"""The report of a placement: halves, both executions, unseen workloads, and a check that notices every change."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.solvers.placement import Placement, PlacementProblem, evaluate, identity
from moecc.solvers.placement.cautions import cautions
from moecc.solvers.placement.dispatch import judge_dispatch
from moecc.solvers.placement.homes import Unit
from moecc.solvers.placement.placing import Placed, place
from moecc.solvers.placement.recheck import recheck
from moecc.solvers.placement.report import judge, judge_one, worse
from moecc.solvers.placement.sweep import sweep, swept_layers
from moecc.solvers.routing import Routing, assumed_routing


def made(name: str, seed: int, *, layers: int = 3, groups: bool = False) -> Routing:
    """Tokens choose 2 of 8 experts, by zipf or in fixed pairs that identity puts on different devices."""
    routing = assumed_routing("zipf", layers=layers, experts=8, top_k=2, tokens=1024, seed=seed)
    if groups:
        pairs = np.array([[0, 4], [1, 5], [2, 6], [3, 7]], np.int16)
        chosen = np.random.default_rng(seed).integers(0, 4, 1024)
        routing = replace(routing, topk_ids=np.repeat(pairs[chosen][:, None], layers, axis=1))
    return replace(routing, name=name, assumption="")


def problem(*workloads: Routing, **options: Any) -> PlacementProblem:
    settings: dict[str, Any] = {
        "devices": 4,
        "devices_per_node": 2,
        "slots_per_device": 2,
        "time_limit_s": 4.0,
    }
    return PlacementProblem(workloads=workloads, **(settings | options))


@pytest.fixture(scope="module")
def placed() -> Placed:
    return place(problem(made("a", 1), made("b", 2), max_imbalance=1.6), leave_one_out=True)


def test_figures_are_of_sequences_that_the_solver_did_not_see(placed: Placed) -> None:
    report = placed.report
    for routing in (made("a", 1), made("b", 2)):
        train, score = routing.split()
        assert not set(train.sequence_ids) & set(score.sequence_ids)
        after = placed.solution.placement
        for half, side in ((train, report.in_sample["after"]), (score, report.after)):
            assert side["workloads"][routing.name] == asdict(evaluate(after, half, "home"))
        assert report.held_out_tokens[routing.name] == len(score.topk_ids)
    assert report.in_sample["after"]["objective"] == placed.solution.certificate.objective


def test_both_executions_are_judged_whatever_was_asked(placed: Placed) -> None:
    executions = placed.report.executions
    assert executions["home"]["after"] == placed.report.after
    assert executions["home"]["after"]["hops"] == 0 < executions["migrate"]["after"]["hops"]
    assert "worth nothing" in placed.report.affinity["home"]
    assert f"{executions['migrate']['after']['hops']:.3f} hops" in placed.report.affinity["migrate"]
    assert "not solved for it" in placed.report.affinity["migrate"]


def test_every_workload_is_left_out_once(placed: Placed) -> None:
    assert [row["workload"] for row in placed.report.unseen] == ["a", "b"]
    for row in placed.report.unseen:
        assert row["before"] == placed.report.before["workloads"][row["workload"]]


def test_structure_that_all_workloads_share_helps_an_unseen_one() -> None:
    report = place(problem(made("a", 1, groups=True), made("b", 2, groups=True)), leave_one_out=True).report
    for row in report.unseen:
        assert row["before"]["fan_out"] == 2
        assert row["after"]["fan_out"] == 1
    assert not [text for text in report.warnings if "devices per token" in text]


def test_a_workload_that_contradicts_the_others_is_warned_of() -> None:
    # b's pairs stand together under identity; a's placement tears them apart.
    a, b = made("a", 1, groups=True), made("b", 2, groups=True)
    together = np.array([0, 2, 4, 6, 1, 3, 5, 7], np.int16)
    contrary = replace(b, topk_ids=together[b.topk_ids])
    report = place(problem(a, contrary), leave_one_out=True).report
    row = report.unseen[1]
    assert row["before"]["fan_out"] == 1
    assert row["after"]["fan_out"] == 2
    assert any(
        "solved without 'b', worse than identity on it: cost of the links" in w for w in report.warnings
    )


def test_one_workload_leaves_none_out() -> None:
    assert place(problem(made("a", 1)), leave_one_out=True).report.unseen == []


def test_a_cap_that_does_not_hold_is_a_warning() -> None:
    asked = problem(made("a", 1), max_imbalance=1.0)
    judged = judge_one(asked, identity(asked))
    report = judge(asked, judged, judged)
    assert any(
        text.startswith("max_imbalance 1 does not hold on held-out sequences") for text in report.warnings
    )


def test_worse_names_the_figures_with_both_values() -> None:
    before, after = (
        {"imbalance": 1.1, "fan_out": 2.0, "hops": 0.5},
        {"imbalance": 1.2, "fan_out": 1.5, "hops": 0.6},
    )
    assert worse(before, after, "fan_out") == "imbalance 1.200 against 1.100"
    assert (
        worse(before, after, "hops") == "hops per token 0.600 against 0.500 and imbalance 1.200 against 1.100"
    )
    assert worse(before, before, "fan_out") == ""


def test_traffic_alone_that_unbalances_is_a_warning() -> None:
    report = place(problem(made("a", 1), objective="traffic", max_imbalance=None)).report
    sides = [report.in_sample[side]["balance_imbalance"] for side in ("before", "after")]
    warned = any("is above identity's" in text for text in report.warnings)
    assert warned == (sides[1] > sides[0] + 1e-9)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"dispatch": "lp"}, False),
        ({"dispatch": "lp", "balance": "cvar"}, True),
        ({"dispatch": "random"}, False),
        ({"dispatch": "nearest"}, False),
        ({"dispatch": "nearest", "execution": "migrate"}, True),
        ({"dispatch": "lp", "slots_per_device": 2}, False),
    ],
)
def test_a_rule_that_the_search_does_not_count_is_a_warning(options, warned) -> None:
    asked = problem(made("a", 1), **({"slots_per_device": 3} | options))
    found = cautions(asked, {side: {"balance_imbalance": 1.0} for side in ("before", "after")})
    assert any("is judged, not searched" in text for text in found) == warned


TRACES = (made("other name", 1), made("b", 2))


def test_a_file_agrees_with_its_traces_under_any_name(placed: Placed) -> None:
    found = recheck(placed.to_json(), TRACES[::-1])
    assert found.wrong == ()
    assert found.figures > 100
    assert "report.unseen" in found.skipped


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("report", "after", "fan_out"), 1.0),
        (("report", "in_sample", "before", "workloads", "a", "imbalance"), 1.0),
        (("report", "executions", "migrate", "after", "hops"), 0.0),
        (("report", "layers", 1, "after", "imbalance"), 1.0),
        (("report", "affinity", "home"), "affinity is worth a lot"),
        (("report", "held_out_tokens", "b"), 7),
        (("report", "after"), {}),
        (("certificate", "objective"), 1.0),
    ],
)
def test_a_changed_figure_is_noticed(placed: Placed, path: tuple[Any, ...], value: object) -> None:
    data = json.loads(placed.to_json())
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    wrong = recheck(json.dumps(data), TRACES).wrong
    assert wrong
    assert all(
        line.startswith(".".join(str(k) for k in path[:2] if not isinstance(k, int))) for line in wrong
    )


def test_another_placement_under_the_same_figures_is_noticed(placed: Placed) -> None:
    data = json.loads(placed.to_json())
    row = data["physical_to_logical_map"][0]
    row[0], row[-1] = row[-1], row[0]
    assert recheck(json.dumps(data), TRACES).wrong


def test_other_traces_and_other_files_are_refused(placed: Placed) -> None:
    with pytest.raises(InputError, match=r"none of the traces given is the one recorded as 'a'"):
        recheck(placed.to_json(), TRACES[1:])
    data = json.loads(placed.to_json())
    with pytest.raises(InputError, match="it has no report"):
        recheck(json.dumps(data | {"report": {}}), TRACES)
    data["report"]["request"]["devices"] = 8
    with pytest.raises(InputError, match="devices"):
        recheck(json.dumps(data), TRACES)
    bare = Placement.from_json(placed.to_json()).to_json()
    with pytest.raises(InputError, match="it has no report"):
        recheck(json.dumps(bare), TRACES)


def test_an_interrupt_keeps_the_placement_and_skips_the_rest() -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    found = place(problem(made("a", 1), made("b", 2)), leave_one_out=True, progress=interrupt)
    assert found.solution.certificate.interrupted
    assert found.report.unseen == []
    assert recheck(found.to_json(), TRACES).wrong == ()


def test_a_sweep_trades_traffic_for_balance() -> None:
    asked = problem(made("a", 1, layers=8), slots_per_device=2)
    points = sweep(asked, time_limit_s=3.0, caps=(1.05, None))
    assert [point.label for point in points] == ["cap 1.05", "no cap"]
    assert points[0].imbalance <= points[1].imbalance
    assert points[0].cost >= points[1].cost
    assert len(swept_layers(asked)) == 6
    assert swept_layers(replace(asked, execution="migrate")) == [1, 2, 3, 4, 5, 6]


def test_replicas_are_judged_by_the_engine_s_rule() -> None:
    found = place(problem(made("a", 1), slots_per_device=3, dispatch="nearest"))
    held_out = (made("a", 1).split()[1],)
    expected = judge_dispatch(found.solution.placement, held_out, "nearest")
    assert found.report.dispatch["rule"] == "nearest"
    assert found.report.dispatch["after"] == asdict(expected)
    assert place(problem(made("a", 1))).report.dispatch == {}
    assert recheck(found.to_json(), (made("a", 1),)).wrong == ()


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_chosen_homes_are_judged_and_cost_nothing_else(unit: Unit) -> None:
    asked = problem(made("a", 1, groups=True))
    found = place(asked, homes=unit)
    row = found.report.homes["workloads"]["a"]
    # One device serves both experts of a token in every layer, the same one after renaming; a full one sends some away.
    assert row["random"] == pytest.approx(0.75)
    assert row["chosen"] < (0.1 if unit == "token" else 0.75)
    # Two held-out sequences cannot fill four devices.
    assert row["fullest"] == (1.0 if unit == "token" else 2.0)
    assert found.report.in_sample["after"]["objective"] == found.solution.certificate.objective
    assert recheck(found.to_json(), (made("a", 1, groups=True),)).wrong == ()


def test_homes_that_cannot_be_chosen_are_refused_before_solving() -> None:
    with pytest.raises(InputError, match="tokens stay where they land"):
        place(problem(made("a", 1), execution="migrate"), homes="token")
    short = replace(made("a", 1), sequence_ids=np.arange(1024, dtype=np.int32) // 16)
    with pytest.raises(InputError, match="no held-out sequence is longer than 32 tokens"):
        place(problem(short), homes="sequence")


def test_moves_from_a_placement_in_force_keep_their_budget() -> None:
    old = identity(problem(made("a", 1)))
    asked = problem(made("a", 1), in_force=old, expert_bytes=10, max_moved_bytes=45)
    found = place(asked)
    moves = found.report.moves
    assert moves["experts"] == len(moves["schedule"]) == sum(moves["rounds"]) <= 4
    assert moves["moved_bytes"] == 10 * moves["experts"]
    assert recheck(found.to_json(), (made("a", 1),)).wrong == ()


def test_time_is_kept() -> None:
    large = [
        replace(assumed_routing("zipf", layers=8, experts=32, top_k=4, tokens=4096, seed=s), name=f"w{s}")
        for s in range(2)
    ]
    started = time.monotonic()
    place(problem(*large, devices=8, slots_per_device=4, max_imbalance=1.2), leave_one_out=True)
    assert time.monotonic() - started < 4.0 * 1.5
