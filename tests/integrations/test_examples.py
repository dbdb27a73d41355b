"""The examples that ship: each loads, names a known device, and the recorded traces are what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.frontend.model_yaml import load_model_yaml
from moecc.frontend.trace import load_trace
from moecc.frontend.workloads import workloads
from moecc.hardware.load import load_device
from moecc.solvers.routing_stats import routing_stats

EXAMPLES = Path(__file__).parents[2] / "examples"
TRACES = EXAMPLES / "tiny-moe" / "traces"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_loads_and_its_routing_fits_its_model(path: Path) -> None:
    spec = load_model_yaml(path)
    assert load_device(spec.cluster.device).name == spec.cluster.device
    assert spec.targets
    for routing in workloads(spec):
        assert (routing.layers, routing.num_experts, routing.top_k) == (
            len(spec.model.moe_layers),
            spec.model.experts,
            spec.model.top_k,
        )


@pytest.mark.parametrize("name", ["code", "prose"])
def test_a_shipped_trace_is_the_routing_of_a_trained_model(name: str) -> None:
    stats = routing_stats(load_trace(TRACES / f"{name}.npz"))
    assert (stats.tokens, stats.sequences, stats.experts, stats.top_k) == (16384, 64, 32, 4)
    # random routing gives 0 bits and 1: no structure, nothing for placement to find
    assert min(stats.adjacent_information_bits) > 1
    assert min(stats.co_activation) > 1.2
    assert max(stats.load_skew) < 4  # no layer has collapsed onto a few experts


def test_the_traces_stay_small() -> None:
    assert sum(path.stat().st_size for path in TRACES.iterdir()) < 3e6
