"""Placement formats: what is written comes back, as the engine's own loader would read it; nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.engines import FORMATS, export_placement, read_placement
from moecc.engines.slots import why_impossible
from moecc.errors import InputError
from moecc.solvers.placement import Placement

SUFFIX = {
    "sglang": "json",
    "vllm": "jsonl",
    "trtllm": "yaml",
    "ascend": "json",
    "eplb": "pt",
    "exflow": "csv",
}


def make(
    seed: int, *, layers: int, experts: int, devices: int, width: int, devices_per_node: int = 1
) -> Placement:
    """A random placement: random cyclic shifts of a permutation never put two replicas on one device."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        order = rng.permutation(experts)
        held = np.array([order[p % experts] for p in range(devices * width)]).reshape(devices, width)
        rows.append(rng.permuted(held, axis=1)[rng.permutation(devices)].ravel())
    return Placement(
        physical_to_logical=np.array(rows, np.int32),
        devices=devices,
        devices_per_node=devices_per_node,
        slots_per_device=width,
        num_experts=experts,
    )


@st.composite
def models(draw: st.DrawFn, spare: bool = True) -> tuple[Placement, int, list[int]]:
    devices = draw(st.integers(1, 4))
    width = draw(st.integers(1, 6))
    experts = draw(st.integers(width, devices * width)) if spare else devices * width
    layers = draw(st.integers(1, 4))
    total = draw(st.integers(layers, layers + 3))
    moe = sorted(draw(st.permutations(range(total)))[:layers])
    placement = make(
        draw(st.integers(0, 2**32)), layers=layers, experts=experts, devices=devices, width=width
    )
    return placement, total, moe


def held(placement: Placement) -> list[list[set[int]]]:
    """[layer][device] -> experts."""
    shape = (placement.layers, placement.devices, placement.slots_per_device)
    return [[set(d) for d in row] for row in placement.physical_to_logical.reshape(shape).tolist()]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25)
@given(data=st.data())
def test_what_is_written_comes_back(name: str, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    placement, total, moe = data.draw(models(spare=name != "exflow"))
    path = tmp_path_factory.mktemp("formats") / f"placement.{SUFFIX[name]}"
    if name == "eplb" and data.draw(st.booleans()):
        path = path.with_suffix(".npz")
    flags = export_placement(placement, total, moe, name, path)
    back = read_placement(
        path, name, devices=placement.devices, num_experts=placement.num_experts, moe_layers=moe
    )
    assert held(back) == held(placement)
    if name != "exflow":
        np.testing.assert_array_equal(back.physical_to_logical, placement.physical_to_logical)
    assert shlex.quote(str(path)) in flags or str(path) in flags
    assert [p.name for p in path.parent.iterdir()] == [path.name]


PLACEMENT = Placement(
    physical_to_logical=np.array([[0, 1, 2, 3, 3, 0], [2, 1, 3, 0, 1, 2]], np.int32),
    devices=3,
    devices_per_node=3,
    slots_per_device=2,
    num_experts=4,
)


def exported(name: str, folder: Path) -> tuple[Path, str]:
    path = folder / f"p.{SUFFIX[name]}"
    return path, export_placement(PLACEMENT, 4, [1, 3], name, path)


def test_sglang_has_one_key_and_all_layers(tmp_path: Path) -> None:
    path, flags = exported("sglang", tmp_path)
    dense = [0, 1, 2, 3, 0, 1]
    rows = PLACEMENT.physical_to_logical.tolist()
    assert json.loads(path.read_text()) == {"physical_to_logical_map": [dense, rows[0], dense, rows[1]]}
    assert flags == (
        "--tp-size 3 --ep-size 3 --ep-num-redundant-experts 2 --ep-dispatch-algorithm static"
        f" --init-expert-location {path}"
    )


def test_vllm_writes_the_record_that_its_loader_checks(tmp_path: Path) -> None:
    path, flags = exported("vllm", tmp_path)
    assert json.loads(path.read_text()) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 6,
        "initial_global_assignments": {"0": [0, 1, 2, 3, 3, 0], "1": [2, 1, 3, 0, 1, 2]},
    }
    config = json.loads(shlex.split(flags)[-1])
    assert config == {"num_redundant_experts": 2, "initial_mapping_path": str(path)}


def test_trtllm_names_the_models_layers(tmp_path: Path) -> None:
    path, _ = exported("trtllm", tmp_path)
    assert yaml.safe_load(path.read_text()) == {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {1: [0, 1, 2, 3, 3, 0], 3: [2, 1, 3, 0, 1, 2]},
    }


def test_ascend_lists_devices(tmp_path: Path) -> None:
    path, flags = exported("ascend", tmp_path)
    data = json.loads(path.read_text())
    assert data["moe_layer_count"] == 2
    assert data["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 3,
        "device_list": [
            {"device_id": 0, "device_expert": [2, 1]},
            {"device_id": 1, "device_expert": [3, 0]},
            {"device_id": 2, "device_expert": [1, 2]},
        ],
    }
    assert json.loads(shlex.split(flags)[-1]) == {
        "eplb_config": {"expert_map_path": str(path), "num_redundant_experts": 2}
    }


def test_eplb_tensors_are_inverse_maps(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path, _ = exported("eplb", tmp_path)
    data = torch.load(path, weights_only=True)
    rows, where, counts = (
        data[k].numpy() for k in ("physical_to_logical_map", "logical_to_physical_map", "expert_count")
    )
    assert counts.tolist() == [[2, 1, 1, 2], [1, 2, 2, 1]]
    for layer in range(2):
        for expert in range(4):
            slots = [int(s) for s in where[layer, expert] if s >= 0]
            assert slots == np.flatnonzero(rows[layer] == expert).tolist()


def test_exflow_numbers_experts_through_the_layers(tmp_path: Path) -> None:
    placement = dataclasses.replace(
        PLACEMENT, physical_to_logical=PLACEMENT.physical_to_logical[:, :4], devices=2, devices_per_node=2
    )
    path = tmp_path / "p.csv"
    export_placement(placement, 4, [1, 3], "exflow", path)
    assert path.read_text().split() == ["Expert,Node", "0,0", "1,0", "2,1", "3,1", "4,1", "5,0", "6,0", "7,1"]


@pytest.mark.parametrize(
    ("name", "file", "error"),
    [
        (
            "exflow",
            "p.csv",
            "ExFlow has no replicas, the placement has 2 spare slots a layer; hint: place with 4 slots",
        ),
        ("sglang", "p.txt", "SGLang reads no file of this name; hint: end the name in .json"),
        ("ascend", "p.map", "vllm-ascend reads no file of this name; hint: end the name in .json"),
        ("eplb", "p.json", "EPLB tensors are written as .pt or .npz; hint: end the name in .pt or .npz"),
        ("tgi", "p.json", "format 'tgi' is unknown; hint: use one of sglang, vllm, trtllm"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(name: str, file: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_placement(PLACEMENT, 4, [1, 3], name, tmp_path / file)
    assert error in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "devices", "reason"),
    [
        ([[0, 0, 1, 2]], 2, "layer 0: device 0 holds expert 0 twice"),
        ([[0, 1, 2, 1]], 3, "4 slots do not divide over 3 devices"),
        ([[0, 1, 1, 0]], 2, "layer 0: expert 2 has no slot"),
        ([[0, 1, 2, 3]], 2, "layer 0, slot 3 holds expert 3, not in [0, 3)"),
    ],
)
def test_tables_that_no_engine_loads(rows: list[list[int]], devices: int, reason: str) -> None:
    found = why_impossible(np.array(rows), 3, devices)
    assert found is not None
    assert found[0] == reason


@pytest.mark.parametrize(
    ("total", "moe", "error"),
    [
        (4, [1], "1 MoE layers are named, the placement has 2"),
        (4, [3, 1], "MoE layers [3, 1] are not rising within [0, 4)"),
        (3, [1, 3], "MoE layers [1, 3] are not rising within [0, 3)"),
        (3, [1, 1], "MoE layers [1, 1] are not rising within [0, 3)"),
    ],
)
def test_layers_must_fit_the_model(total: int, moe: list[int], error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MoE layers") as caught:
        export_placement(PLACEMENT, total, moe, "sglang", tmp_path / "p.json")
    assert error in str(caught.value)


P = "physical_to_logical_map"
MAPPING = {"record_type": "eplb_initial_mapping", "version": 1, "num_slots": 2, "num_redundant_experts": 0}
MALFORMED = [
    ("sglang", "{", ":1:2: not valid JSON"),
    ("sglang", "[]", "it holds a list, not an object"),
    ("sglang", '{"logical_count": [[1]]}', f"'{P}' is missing"),
    ("sglang", f'{{"{P}": [[0, 1]], "report": 1}}', "key 'report' breaks SGLang's loader"),
    ("sglang", f'{{"{P}": [[0, 1], [0]]}}', f"{P}[1]: it has 1 entries, not 2"),
    ("sglang", f'{{"{P}": [[0, 1.5]]}}', f"{P}[0][1]: 1.5 is not an expert id"),
    ("sglang", f'{{"{P}": [[0, true]]}}', f"{P}[0][1]: True is not an expert id"),
    ("sglang", f'{{"{P}": [[0, {"9" * 5000}]]}}', "not usable JSON"),
    ("sglang", f'{{"{P}": [[0, NaN]]}}', "NaN is not a JSON number"),
    ("sglang", "[" * 100_000, "not usable JSON"),
    ("sglang", f'{{"{P}": [[0, 1, 0]]}}', "layer 0: device 0 holds expert 0 twice"),
    ("vllm", "", "it has 0 records of type eplb_initial_mapping"),
    ("vllm", json.dumps(MAPPING | {"version": 2}), ":1: version '2' is unknown"),
    ("vllm", json.dumps(MAPPING | {"num_redundant_experts": -1}), ":1: num_redundant_experts is '-1'"),
    ("vllm", json.dumps(MAPPING | {"initial_global_assignments": {"1": [0, 1]}}), "layers are missing"),
    ("vllm", json.dumps(MAPPING | {"initial_global_assignments": {"a": [0, 1]}}), "'a' is not a layer"),
    (
        "vllm",
        json.dumps(MAPPING | {"initial_global_assignments": {"0": [0]}}),
        "[0]: it has 1 entries, not 2",
    ),
    ("trtllm", "num_slots: [", "not valid YAML"),
    ("trtllm", "num_slots: 2\nfoo: 1", "unknown key 'foo'"),
    ("trtllm", "num_slots: two", "num_slots is 'two'"),
    ("trtllm", "num_slots: 2\ninitial_global_assignments: {3: [0, 1, 2]}", "[3]: it has 3 entries, not 2"),
    ("trtllm", "!!python/object/apply:os.system ['false']", "not valid YAML"),
    ("ascend", '{"moe_layer_count": 2, "layer_list": [{}]}', "moe_layer_count is 2, layer_list has 1"),
    ("ascend", '{"moe_layer_count": 1, "layer_list": [{}]}', "layer_list[0]: 'device_list' is not a list"),
    ("eplb", "nonsense", "the file is damaged or of another kind"),
    ("exflow", "0,1\n", ":1: the header is missing"),
    ("exflow", "Expert,Node\n0,0\n0,1\n", ":3: expert 0 is there twice"),
    ("exflow", "Expert,Node\n0,-1\n", ":2: '0,-1' is not 'expert,node'"),
    ("exflow", "Expert,Node\n1,0\n", "experts are missing"),
]


@pytest.mark.parametrize(("name", "text", "error"), MALFORMED)
def test_malformed_files(name: str, text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_placement(path, name, devices=1, num_experts=2)
    assert str(caught.value).startswith(str(path))
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"devices": None}, "the file does not say how many devices it is for"),
        ({"devices": 4}, "6 slots do not divide over 4 devices"),
        ({"moe_layers": [1, 9]}, "layer 9 is missing"),
        ({"num_experts": 3}, "holds expert 3, not in [0, 3)"),
        ({"num_experts": 5}, "expert 4 has no slot"),
        ({"devices_per_node": 2}, "3 devices do not fill nodes of 2"),
    ],
)
def test_files_that_do_not_fit(arguments: dict[str, Any], error: str, tmp_path: Path) -> None:
    path, _ = exported("sglang", tmp_path)
    with pytest.raises(InputError) as caught:
        read_placement(path, "sglang", **{"devices": 3, "moe_layers": [1, 3], **arguments})
    assert error in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for name in FORMATS:
        with pytest.raises(InputError, match="there is no such file"):
            read_placement(tmp_path / "absent.npz", name, devices=1)
        with pytest.raises(InputError, match="this is a folder"):
            read_placement(tmp_path, name, devices=1)


@pytest.mark.parametrize("name", FORMATS)
def test_corrupted_files_raise_nothing_but_input_errors(name: str, tmp_path: Path) -> None:
    placement = make(1, layers=2, experts=6, devices=3, width=2)
    source, path = tmp_path / f"p.{SUFFIX[name]}", tmp_path / f"bad.{SUFFIX[name]}"
    export_placement(placement, 3, [0, 2], name, source)
    whole, rng = source.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 5])] = rng.randbytes(rng.choice([0, 1, 1, 3]))
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
        try:
            read_placement(path, name, devices=3, num_experts=6, moe_layers=[0, 2])
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 60
