"""Module attributes are input like any other: what is missing or impossible is named, whatever the pass."""

from __future__ import annotations

from typing import Any

import pytest

from moecc.errors import InputError
from moecc.ir.core import Module
from moecc.passes.manager import Context, run_passes
from moecc.passes.pipeline import passes_named

CLUSTER = {"device": "h100-sxm", "nodes": 1, "devices_per_node": 1}
SERVING = {"execution": "home", "context": 512, "decode": 64, "prefill": 2048}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "module @m: in 'overlap': attribute cluster is missing; hint: see the attributes"),
        ({"cluster": 3}, "attribute cluster is missing"),
        ({"cluster": {}, "serving": SERVING}, "attribute cluster.device is missing"),
        (
            {"cluster": {**CLUSTER, "nodes": 0}, "serving": SERVING},
            "attribute cluster.nodes must be at least 1, not 0",
        ),
        (
            {"cluster": {**CLUSTER, "nodes": True}, "serving": SERVING},
            "attribute cluster.nodes must be int, not True",
        ),
        ({"cluster": {**CLUSTER, "device": "h1"}, "serving": SERVING}, "unknown device 'h1'"),
        ({"cluster": CLUSTER}, "attribute serving is missing"),
        (
            {"cluster": CLUSTER, "serving": {**SERVING, "decode": "x"}},
            "attribute serving.decode must be int, not 'x'",
        ),
        (
            {"cluster": CLUSTER, "serving": {**SERVING, "decode": 0}},
            "attribute serving.decode must be at least 1",
        ),
        (
            {"cluster": CLUSTER, "serving": {**SERVING, "execution": "x"}},
            "attribute serving.execution must be home or",
        ),
    ],
)
def test_impossible_attributes_are_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run_passes(Module("m", [], attributes), passes_named("overlap"), Context())
    assert message in str(caught.value)
