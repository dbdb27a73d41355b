"""The straight line of the placement's step cost against the latency model it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecc.frontend.from_flags import spec_of
from moecc.frontend.to_ir import import_model
from moecc.frontend.workloads import workloads
from moecc.hardware import Cluster, ExpertLayer, latency_us, load_device
from moecc.passes.manager import Context, run_passes
from moecc.passes.normalize import Normalize
from moecc.passes.place import Place
from moecc.passes.step_cost import step_cost

CLUSTER = Cluster(device=load_device("h100-sxm"), nodes=2, devices_per_node=8)


@pytest.mark.parametrize("tokens", [128, 4096])
@pytest.mark.parametrize("load", [1.0, 1.25, 1.5])
def test_the_line_is_close_to_the_model_between_its_ends(tokens: int, load: float) -> None:
    cost = step_cost(
        CLUSTER, hidden=7168, intermediate=2048, top_k=8, slots=16, dtype="bfloat16", tokens_per_device=tokens
    )
    rows = tokens * 8.0
    layer = ExpertLayer(
        tokens=rows, rows=rows * load, experts_active=16, hidden=7168, intermediate=2048, dtype="bfloat16"
    )
    empty_exchanges = 2 * (
        CLUSTER.device.intra_link.alpha_us["prefill"] + CLUSTER.device.inter_link.alpha_us["prefill"]
    )
    predicted = cost.fixed_us + cost.compute_us_per_row * layer.rows
    assert predicted == pytest.approx(latency_us(layer, CLUSTER) + empty_exchanges, rel=0.01)
    assert cost.tokens == 16 * tokens
    assert cost.bytes_per_token == 2 * 2 * 7168


def test_the_pass_places_by_predicted_time() -> None:
    spec = spec_of(
        model=None, hf_config=None, preset="olmoe-1b-7b", device="h100-sxm", nodes=2, devices_per_node=2
    )
    placement = replace(spec.placement, objective="step", balance="worst", time_limit_s=2.0)
    module = import_model(replace(spec, placement=placement))
    run_passes(module, (Normalize(), Place()), Context(workloads=workloads(spec)))
    placed = module.attributes["placement"]
    cost = placed["report"]["request"]["step_cost"]
    assert placed["certificate"]["objective"] > cost["fixed_us"] > 0
    assert placed["report"]["in_sample"]["after"]["objective"] == placed["certificate"]["objective"]
