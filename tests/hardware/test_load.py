"""Device files: every shipped one is sound and sourced; what is wrong in a user's own is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import moecc.hardware
from moecc.errors import InputError
from moecc.hardware import DTYPE_BYTES, device_names, load_device, parse_device

DATA = Path(moecc.hardware.__file__).parent / "data"


def numbers(node: Any, path: str = "") -> list[str]:
    """Paths of all numbers that do not stand in a {value, source} pair."""
    if isinstance(node, dict):
        if set(node) == {"value", "source"}:
            return []
        return [found for key, child in node.items() for found in numbers(child, f"{path}.{key}")]
    return [path] if isinstance(node, (int, float)) and not isinstance(node, bool) else []


@pytest.mark.parametrize("name", device_names())
def test_shipped_device_is_sound(name: str) -> None:
    device = load_device(name)
    data = yaml.safe_load((DATA / f"{name}.yaml").read_text())
    assert device.name == name
    assert numbers(data) == []
    assert {"bfloat16", "float16", "float32"} <= set(device.peak_tflops) <= set(DTYPE_BYTES)
    used = set(yaml_sources(data))
    assert used == set(data["sources"]), "every source is used and every use is explained"
    for roofs in (device.dense, device.experts):
        assert 0.2 < roofs.memory_efficiency <= 1.0
        assert all(0.2 < value <= 1.0 for value in roofs.compute_efficiency.values())
    for link in (device.intra_link, device.inter_link):
        assert all(0.2 < value <= 1.0 for value in link.efficiency.values())


def yaml_sources(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    own = [node["source"]] if set(node) == {"value", "source"} else []
    return own + [source for child in node.values() for source in yaml_sources(child)]


def test_datasheet_ratios() -> None:
    """Relations between the parts that anyone can look up, to catch a slipped digit."""
    h100, h200, a100 = (load_device(f"{name}-sxm") for name in ("h100", "h200", "a100"))
    assert h200.peak_tflops == h100.peak_tflops
    assert h200.memory_bandwidth_gb_s / h100.memory_bandwidth_gb_s == pytest.approx(1.43, rel=0.01)
    assert h100.intra_link.bandwidth_gb_s / a100.intra_link.bandwidth_gb_s == 1.5
    assert "fp8" not in a100.peak_tflops


def test_confidence_says_what_was_measured() -> None:
    assert load_device("mi300x").confidence() == "mi300x: datasheet constants, uncalibrated"
    assert "experts 5.4 %" in load_device("h100-sxm").confidence()
    a100 = load_device("a100-sxm").confidence()
    assert a100.endswith("uncalibrated: decode, prefill")


def test_unknown_device_names_the_closest() -> None:
    with pytest.raises(InputError) as caught:
        load_device("h100_sxm")
    assert "did you mean 'h100-sxm'?" in str(caught.value)
    assert "mi300x" in str(caught.value)


def test_own_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((DATA / "h100-sxm.yaml").read_text().replace("name: h100-sxm", "name: mine"))
    assert load_device(str(own)).name == "mine"
    with pytest.raises(InputError, match="cannot read the device file"):
        load_device(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("cores",), None, "cores: missing"),
        (("cores",), 132, "cores: must be {value: number, source"),
        (("colour",), "red", "colour: unknown key"),
        (("calibrated",), "yes", "calibrated: must be true or false"),
        (("calibrated",), False, "calibrated and error_pct contradict"),
        (("memory_gb",), {"value": 0, "source": "datasheet"}, "memory_gb: value 0 is out of range"),
        (("memory_gb",), {"value": True, "source": "datasheet"}, "memory_gb: value must be a finite number"),
        (("memory_gb",), {"value": float("inf"), "source": "datasheet"}, "finite number"),
        (("memory_gb",), {"value": 80, "source": "hearsay"}, "source 'hearsay' is not in `sources`"),
        (("dense", "memory_efficiency"), {"value": 2, "source": "datasheet"}, "dense.memory_efficiency"),
        (("intra_link", "alpha_us", "decode"), None, "intra_link.alpha_us: wrong keys"),
        (("peak_tflops", "int3"), {"value": 1, "source": "datasheet"}, "peak_tflops: wrong keys"),
        (("peak_tflops", "fp8"), None, "differ in dtypes"),
        (("sources",), [1], "sources. must be a mapping"),
    ],
)
def test_wrong_files_are_named(path: tuple[str, ...], value: Any, message: str) -> None:
    data = yaml.safe_load((DATA / "h100-sxm.yaml").read_text())
    target = data
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    with pytest.raises(InputError) as caught:
        parse_device(yaml.safe_dump(data), where="mine.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.yaml: ")


def test_not_yaml() -> None:
    with pytest.raises(InputError, match="not YAML"):
        parse_device("a: [", where="mine.yaml")
