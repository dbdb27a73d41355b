"""Traces: what is saved comes back; what is malformed is refused in one line; nothing else ever happens."""

from __future__ import annotations

import io
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError, MoeccError
from moecc.frontend import trace
from moecc.frontend.hf_config import load_preset
from moecc.frontend.trace import check_trace, load_trace, save_trace
from moecc.solvers.routing import Routing, assumed_routing

IDS = np.array([[[0, 1], [2, 3]], [[3, 1], [0, 2]], [[1, 2], [1, 0]]], np.int16)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    experts = draw(st.integers(1, 40))
    top_k = draw(st.integers(1, experts))
    tokens, layers = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    order = np.argsort(rng.random((tokens, layers, experts)), axis=2)
    return Routing(
        name="t",
        topk_ids=order[:, :, :top_k].astype(np.int16),
        num_experts=experts,
        sequence_ids=np.sort(rng.integers(0, 2**31, tokens)).astype(np.int32),
        assumption=draw(st.sampled_from(["", "assumed routing (uniform), not measured"])),
    )


@settings(max_examples=40)
@given(routing=routings(), with_weights=st.booleans())
def test_what_is_saved_comes_back(routing: Routing, with_weights: bool) -> None:
    import tempfile

    weights = np.ones(routing.topk_ids.shape, np.float32) / routing.top_k if with_weights else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.npz"
        save_trace(path, routing, topk_weights=weights)
        back = load_trace(path)
        assert os.listdir(folder) == ["t.npz"]
    assert back.topk_ids.dtype == np.int16
    assert back.sequence_ids.dtype == np.int32
    np.testing.assert_array_equal(back.topk_ids, routing.topk_ids)
    np.testing.assert_array_equal(back.sequence_ids, routing.sequence_ids)
    assert (back.name, back.num_experts, back.assumption) == ("t", routing.num_experts, routing.assumption)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "u8", "i2"])
def test_any_integer_type_is_taken(dtype: str, tmp_path: Path) -> None:
    ids = np.asfortranarray(IDS.astype(dtype))
    np.savez(tmp_path / "t.npz", topk_ids=ids, num_experts=np.array([4], np.uint8))
    routing = load_trace(tmp_path / "t.npz", "chat")
    assert routing.topk_ids.dtype == np.int16
    assert routing.topk_ids.flags.c_contiguous
    np.testing.assert_array_equal(routing.topk_ids, IDS)
    np.testing.assert_array_equal(routing.sequence_ids, [0, 0, 0])
    assert routing.name == "chat"


def archive(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{"topk_ids": IDS, "num_experts": 4, **arrays})
    return stream.getvalue()


def changed(index: tuple[int, ...], value: int) -> np.ndarray:
    ids = IDS.copy()
    ids[index] = value
    return ids


def weights(value: float) -> np.ndarray:
    array = np.full(IDS.shape, 0.5, np.float16)
    array[1, 0, 1] = value
    return array


def claims(shape: tuple[int, ...]) -> bytes:
    """An archive whose topk_ids claims a shape that it does not hold."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i2", "fortran_order": False, "shape": shape})
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("topk_ids.npy", header.getvalue() + bytes(10))
        file.writestr("num_experts.npy", b"")
    return stream.getvalue()


def without(key: str) -> bytes:
    stream = io.BytesIO()
    arrays: dict[str, Any] = {"topk_ids": IDS, "num_experts": np.array(4)}
    del arrays[key]
    np.savez(stream, **arrays)
    return stream.getvalue()


SHAPE = "hint: topk_ids is int16 [tokens, layers, top_k]"
PLAIN_WEIGHTS = "hint: topk_weights is float16 [tokens, layers, top_k]"
AGAIN = "hint: record the trace again, or copy the file again"
CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", f"not a readable .npz file (file is not a zip file); {AGAIN}"),
    "text": (b"hello", f"not a readable .npz file (file is not a zip file); {AGAIN}"),
    "truncated": (archive()[:-40], f"not a readable .npz file (file is not a zip file); {AGAIN}"),
    "no ids": (
        without("topk_ids"),
        "the array 'topk_ids' is missing; hint: a trace needs topk_ids and num_experts",
    ),
    "no experts": (
        without("num_experts"),
        "the array 'num_experts' is missing; hint: a trace needs topk_ids and num_experts",
    ),
    "float ids": (archive(topk_ids=IDS.astype(np.float32)), f"topk_ids is float32, not integers; {SHAPE}"),
    "bool ids": (archive(topk_ids=IDS > 1), f"topk_ids is bool, not integers; {SHAPE}"),
    "rank 2": (archive(topk_ids=IDS[0]), f"topk_ids has 2 dimensions, not 3; {SHAPE}"),
    "pickled": (
        archive(topk_ids=np.array([[{}]], object)),
        "topk_ids holds pickled Python objects, which are never loaded; hint: save plain arrays",
    ),
    "no tokens": (
        archive(topk_ids=IDS[:0]),
        "the trace is empty: topk_ids has shape [0, 2, 2]; hint: record at least one token",
    ),
    "no layers": (
        archive(topk_ids=IDS[:, :0]),
        "the trace is empty: topk_ids has shape [3, 0, 2]; hint: record at least one token",
    ),
    "id too large": (
        archive(topk_ids=changed((2, 1, 0), 4)),
        "topk_ids[2, 1, 0] is 4, not in [0, 4); hint: correct num_experts, or leave the token out",
    ),
    "id negative": (
        archive(topk_ids=changed((0, 0, 1), -1)),
        "topk_ids[0, 0, 1] is -1, not in [0, 4); hint: correct num_experts, or leave the token out",
    ),
    "id beyond int16": (
        archive(topk_ids=IDS.astype(np.int64) + (1 << 40)),
        "topk_ids[0, 0, 0] is 1099511627776, not in [0, 4); hint: correct num_experts, or leave the token out",
    ),
    "twice": (
        archive(topk_ids=changed((1, 0, 0), 1)),
        "topk_ids[1, 0] lists expert 1 twice; hint: a token's experts are distinct: leave the token out",
    ),
    "experts below top_k": (
        archive(num_experts=1),
        "top_k 2 is larger than num_experts 1; hint: correct num_experts",
    ),
    "no experts at all": (
        archive(num_experts=0),
        "num_experts 0 is out of range; hint: num_experts must be in [1, 32767]",
    ),
    "experts beyond int16": (
        archive(num_experts=40_000),
        "num_experts 40000 is out of range; hint: num_experts must be in [1, 32767]",
    ),
    "experts is a float": (
        archive(num_experts=4.0),
        "num_experts is float64, not an integer; hint: num_experts is one integer",
    ),
    "experts is a list": (
        archive(num_experts=[4, 4]),
        "num_experts has 1 dimensions, not 0; hint: num_experts is one integer",
    ),
    "sequences short": (
        archive(sequence_ids=np.zeros(2, np.int32)),
        "sequence_ids has shape [2] for 3 tokens; hint: one id for each token",
    ),
    "sequences float": (
        archive(sequence_ids=np.zeros(3)),
        "sequence_ids is float64, not integers; hint: sequence_ids is int32 [tokens]",
    ),
    "sequences huge": (
        archive(sequence_ids=np.full(3, 1 << 40)),
        "sequence_ids do not fit int32; hint: number the sequences from 0",
    ),
    "weights of another shape": (
        archive(topk_weights=np.ones((3, 2, 1), np.float16)),
        "topk_weights has shape [3, 2, 1], topk_ids [3, 2, 2]; hint: give both the same shape",
    ),
    "weights int": (
        archive(topk_weights=IDS),
        f"topk_weights is int16, not floating-point numbers; {PLAIN_WEIGHTS}",
    ),
    "weights nan": (
        archive(topk_weights=weights(np.nan)),
        "topk_weights[1, 0, 1] is nan; hint: weights are finite and not negative",
    ),
    "weights inf": (
        archive(topk_weights=weights(np.inf)),
        "topk_weights[1, 0, 1] is inf; hint: weights are finite and not negative",
    ),
    "weights negative": (
        archive(topk_weights=weights(-1)),
        "topk_weights[1, 0, 1] is -1.0; hint: weights are finite and not negative",
    ),
    "bomb by header": (
        claims((1 << 40, 60, 8)),
        "topk_ids would unpack to 1055531162664960 bytes; "
        "hint: split the trace: an array may take 4 GiB, and compress 200 times at most",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_trace_is_one_line(case: str, tmp_path: Path) -> None:
    content, want = CASES[case]
    path = tmp_path / "chat.npz"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_trace(path)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert line == f"{path}: {want}"


def test_a_bomb_of_zeros_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "RATIO_FREE_BYTES", 1 << 16)
    (tmp_path / "t.npz").write_bytes(archive(topk_ids=np.zeros((100_000, 4, 2), np.int16)))
    with pytest.raises(InputError, match="topk_ids would unpack to 1600128 bytes"):
        load_trace(tmp_path / "t.npz")


def test_a_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file; hint: check the path of the trace"):
        load_trace(tmp_path / "absent.npz")
    with pytest.raises(InputError, match="damaged"):
        load_trace(tmp_path)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez(
        stream,
        topk_ids=IDS,
        num_experts=4,
        sequence_ids=np.arange(3, dtype=np.int32),
        topk_weights=weights(1),
    )
    sources = [stream.getvalue(), archive(sequence_ids=np.arange(3, dtype=np.int32))]
    rng, path, refused = random.Random(0), tmp_path / "t.npz", []
    for trial in range(400):
        content = bytearray(sources[trial % 2])
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if trial % 5 == 0:
            start = rng.randrange(len(content))
            del content[start : start + rng.randrange(40)]
        path.write_bytes(content)
        try:
            routing = load_trace(path)
        except InputError as error:
            refused.append(error)
        else:
            assert routing.topk_ids.min() >= 0
            assert routing.topk_ids.max() < routing.num_experts
    assert len(refused) > 100
    assert all(error.hint and "\n" not in str(error) for error in refused)


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = assumed_routing("uniform", layers=2, experts=4, top_k=2, tokens=8)
    path = tmp_path / "t.npz"
    save_trace(path, routing)
    before = path.read_bytes()

    def full(file: Path, data: bytes) -> None:
        with file.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MoeccError, match="No space left on device") as caught:
        save_trace(path, routing)
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.npz"]


def test_a_routing_that_would_not_load_is_not_saved(tmp_path: Path) -> None:
    bad = Routing("t", changed((1, 0, 0), 1), 4, np.zeros(3, np.int32))
    with pytest.raises(InputError, match="twice"):
        save_trace(tmp_path / "t.npz", bad)
    routing = Routing("t", IDS, 4, np.zeros(3, np.int32))
    with pytest.raises(InputError, match=r"topk_weights\[0, 1, 0\] is inf"):
        save_trace(tmp_path / "t.npz", routing, topk_weights=weights(1).astype(np.float32) * IDS * 1e5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((47, 128, 8), "has 47 layers, the model has 48 MoE layers"),
        ((48, 64, 8), "has 64 experts, the model has 128 experts"),
        ((48, 128, 6), "has 6 experts per token, the model has 8 experts per token"),
    ],
)
def test_a_trace_of_another_model_is_refused(shape: tuple[int, int, int], what: str) -> None:
    layers, experts, top_k = shape
    routing = assumed_routing("uniform", layers=layers, experts=experts, top_k=top_k, tokens=4)
    with pytest.raises(InputError) as caught:
        check_trace(routing, load_preset("qwen3-30b-a3b"), "model.yaml:9:3")
    assert str(caught.value) == (
        f"model.yaml:9:3: the trace 'uniform' {what}; hint: give a trace that was recorded from this model"
    )


def test_published_traces_load() -> None:
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("MOECC_SHARED", root.parent / "shared")) / "data" / "routing"
    if not folder.is_dir():
        pytest.skip("the folder of published traces is not here")
    routing = load_trace(folder / "deepseek_v2_lite_intent.npz")
    assert (routing.layers, routing.num_experts, routing.top_k) == (26, 64, 6)
    assert routing.assumption == ""
    np.testing.assert_allclose(routing.loads().sum(axis=1), 1)


def test_homes_round_trip_and_are_checked(tmp_path):
    ids = np.zeros((3, 1, 1), np.int16)
    routing = Routing("a", ids, 2, np.zeros(3, np.int32), homes=np.array([0, 2, 1], np.int32))
    save_trace(tmp_path / "a.npz", routing)
    homes = load_trace(tmp_path / "a.npz").homes
    assert homes is not None
    assert homes.tolist() == [0, 2, 1]
    for bad, message in (([0, 1], "homes has shape [2] for 3 tokens"), ([0, -1, 0], "homes hold -1")):
        np.savez(tmp_path / "b.npz", topk_ids=ids, num_experts=np.array(2), homes=np.array(bad))
        with pytest.raises(InputError) as error:
            load_trace(tmp_path / "b.npz")
        assert message in str(error.value)
