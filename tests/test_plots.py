"""Drawings: the figures behind them by hand, and files of both kinds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.plots import _best, _device_loads, _hops_between, _slot_loads, draw_placed, image_format
from moecc.solvers.placement import Placement, PlacementProblem, evaluate
from moecc.solvers.placement.placing import place
from moecc.solvers.placement.sweep import SweepPoint
from moecc.solvers.routing import Routing, assumed_routing


def routing(ids: object) -> Routing:
    array = np.asarray(ids, np.int16)
    return Routing(name="made", topk_ids=array, num_experts=3, sequence_ids=np.zeros(len(array), np.int32))


def test_loads_and_hops_by_hand() -> None:
    # Devices {0, 1} and {2, 0}: expert 0 has a replica on each.
    placement = Placement(
        physical_to_logical=np.array([[0, 1, 2, 0]] * 2, np.int32),
        devices=2,
        devices_per_node=1,
        slots_per_device=2,
        num_experts=3,
    )
    made = routing([[[0], [2]], [[0], [1]], [[1], [2]], [[2], [2]]])
    slots = _slot_loads(placement, [made], np.ones(1))
    # Layer 0: expert loads 1/2, 1/4, 1/4; times two devices, expert 0 halved.
    assert slots[0] == pytest.approx([0.5, 0.5, 0.5, 0.5])
    assert _device_loads(placement, slots)[1] == pytest.approx([0.5, 1.5])
    # Landings: 0->1, 0->0, 0->1, 1->1.
    assert _hops_between(placement, made) == pytest.approx(np.array([[0, 0.5], [0, 0]]))
    assert _hops_between(placement, made).sum() == pytest.approx(evaluate(placement, made, "migrate").hops)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        SweepPoint(label=str(i), cap=None, imbalance=x, cost=y)
        for i, (x, y) in enumerate([(1.0, 3.0), (1.1, 2.0), (1.2, 2.0), (1.3, 1.0)])
    ]
    assert [point.label for point in points if _best(point, points)] == ["0", "1", "3"]


@pytest.mark.parametrize("execution", ["home", "migrate"])
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files_are_drawn_and_repeat(execution: str, ending: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    made = replace(assumed_routing("zipf", layers=2, experts=8, top_k=2, tokens=256), name="made")
    problem = PlacementProblem(
        workloads=(made,),
        devices=4,
        devices_per_node=2,
        slots_per_device=3,
        max_imbalance=1.5,
        time_limit_s=1.0,
        execution=execution,  # type: ignore[arg-type]
    )
    placed = place(problem)
    point = SweepPoint(label="no cap", cap=None, imbalance=1.2, cost=1.5)
    image = draw_placed(ending, problem, placed, [point])
    assert image.startswith(magic)
    assert len(image) > 10_000
    if ending == "png":
        assert image == draw_placed(ending, problem, placed, [point])


def test_endings_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"p\.pdf: ending '\.pdf' is unknown; hint: use \.png or \.svg"):
        image_format(Path("p.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        InputError, match=r"p\.svg: drawing needs matplotlib; hint: pip install 'moecc\[plot\]'"
    ):
        image_format(Path("p.svg"))
