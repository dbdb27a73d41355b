"""Shipped constants against the measurements that they were fitted to, where those are at hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moecc.hardware import load_device

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MOECC_SHARED", ROOT.parent / "shared")) / "data"
pytestmark = pytest.mark.skipif(not (DATA / "perf").is_dir(), reason="measurements absent: set MOECC_SHARED")


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_hardware", ROOT / "benchmarks" / "fit_hardware.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_hardware"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm", "x86"])
def test_stated_error_holds(fitting: ModuleType, name: str) -> None:
    """The median error of the shipped constants is at most the stated one plus a tenth of it."""
    device = load_device(name)
    families = fitting.families(name, DATA)
    assert {family.model for family in families} == set(device.error_pct)
    for family in families:
        rows = family.rows[:: max(1, len(family.rows) // 1500)]
        errors = fitting.relative_errors(device, rows)
        assert 100 * np.median(errors) <= 1.1 * device.error_pct[family.model], family.model


def test_fit_recovers_known_constants(fitting: ModuleType) -> None:
    """Rows made by the model itself give its constants back."""
    device = load_device("h100-sxm")
    family = next(f for f in fitting.families("h100-sxm", DATA) if f.model == "decode")
    times = fitting.predict(device, family.rows)
    rows = [
        fitting.replace(row, measured_us=float(time)) for row, time in zip(family.rows, times, strict=True)
    ]
    found = fitting.fit(device, family, rows)
    truth = [
        value
        for link in (device.intra_link, device.inter_link)
        for value in (link.alpha_us["decode"], link.efficiency["decode"])
    ]
    np.testing.assert_allclose(found, truth, rtol=0.02)
