"""Dumps of engines as traces and counts: compared with the routing that they were made from; damage is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.cli import main
from moecc.engines import convert, read_counts
from moecc.errors import InputError
from moecc.frontend.trace import load_trace, save_trace
from moecc.solvers.routing import Routing, assumed_routing

torch = pytest.importorskip("torch")


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def text(array: np.ndarray) -> str:
    return base64.b64encode(npy(array)).decode()


def draw_ids(seed: int, tokens: int, layers: int, experts: int, k: int) -> np.ndarray:
    return assumed_routing("zipf", layers=layers, experts=experts, top_k=k, tokens=tokens, seed=seed).topk_ids


def sglang_dump(
    ids: np.ndarray, experts: int, spare: int, passes: list[dict[str, Any]], dense: int = 1
) -> dict[str, Any]:
    """As SGLang's recorder writes it: ids of slots, 8 columns, dense layers, one record a forward pass."""
    rng = np.random.default_rng(0)
    tokens, layers, k = ids.shape
    slots = np.stack(
        [rng.permutation(np.r_[np.arange(experts), np.arange(spare)]) for _ in range(layers + dense)]
    )
    records, begin = [], 0
    for number, extra in enumerate(passes):
        count = len(extra["positions"])
        part = ids[begin : begin + count]
        begin += count
        table = np.full((layers + dense, count, 8), -1, np.int32)
        for token in range(count):
            for layer in range(layers):
                for j in range(k):
                    options = np.flatnonzero(slots[layer + dense] == part[token, layer, j])
                    table[layer + dense, token, j] = rng.choice(options)
        physical = np.stack([np.bincount(row[row >= 0], minlength=experts + spare) for row in table])
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": [7] * count,
                "forward_mode": 1,
                "misc_objects": [],
                **extra,
                "topk_ids_of_layer": torch.from_numpy(table),
                "global_physical_count": torch.from_numpy(physical),
            }
        )
    assert begin == tokens
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(slots)}


PASSES = [
    {"positions": [0, 1, 2, 0, 1], "extend_seq_lens": [3, 2]},
    {"positions": [3, 2], "extend_seq_lens": None, "forward_mode": 2},
    {"positions": [0, 1], "extend_seq_lens": [2]},
    {"positions": [4, 2, 3], "extend_seq_lens": None, "forward_mode": 2},
]
SEQUENCES = [0, 0, 0, 1, 1, 0, 1, 2, 2, 0, 2, 1]


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), spare=st.integers(0, 4), k=st.integers(1, 8))
def test_sglang_tokens_come_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spare: int, k: int
) -> None:
    ids = draw_ids(seed, len(SEQUENCES), 3, 10, k)
    path = tmp_path_factory.mktemp("dump") / "dump.pt"
    torch.save(sglang_dump(ids, 10, spare, PASSES), path)
    found = convert([path])
    np.testing.assert_array_equal(found.routing.topk_ids, ids)
    assert found.routing.sequence_ids.tolist() == SEQUENCES
    assert found.routing.num_experts == 10
    assert found.notes == ("layers without experts left out: 0",)
    counts = read_counts(path)
    assert counts.shape == (4, 10)
    assert not counts[0].any()
    np.testing.assert_allclose(counts[1:] / (len(ids) * k), found.routing.loads())


def test_padded_tokens_are_left_out(tmp_path: Path) -> None:
    ids = draw_ids(1, 12, 3, 10, 4)
    dump = sglang_dump(ids, 10, 2, PASSES)
    dump["records"][1]["topk_ids_of_layer"][2, 1] = -1
    torch.save(dump, tmp_path / "d.pt")
    found = convert([tmp_path / "d.pt"])
    np.testing.assert_array_equal(found.routing.topk_ids, np.delete(ids, 6, axis=0))
    assert "1 tokens without all of their experts left out (padding)" in found.notes


def per_pass(dump: dict[str, Any]) -> dict[str, Any]:
    records = [{k: v for k, v in r.items() if k != "topk_ids_of_layer"} for r in dump["records"]]
    return {**dump, "records": records}


def test_counts_alone_are_no_trace(tmp_path: Path) -> None:
    ids = draw_ids(2, 12, 3, 10, 4)
    dump = sglang_dump(ids, 10, 2, PASSES)
    torch.save(per_pass(dump), tmp_path / "pass.pt")
    stat = {
        "rank": 0,
        "logical_count": torch.ones(2, 3, 5, dtype=torch.int32),
        "average_utilization_rate_over_window": None,
    }
    torch.save(stat, tmp_path / "stat.pt")
    record = {"record_type": "eplb_load_stats", "version": 1, "step": 7, "num_ranks": 2}
    record |= {"expert_load": [[10, 1, 5, 2], [2, 8, 1, 3]], "p2l_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}
    (tmp_path / "stats.jsonl").write_text(
        json.dumps({"record_type": "session_metadata"}) + "\n" + 2 * (json.dumps(record) + "\n")
    )
    (tmp_path / "count.json").write_text(json.dumps({"logical_count": [[1, 2], [3, 4]]}))
    np.save(tmp_path / "counts.npy", np.array([[1, 2], [3, 4]]))
    for name, kind in (("pass.pt", "per_pass"), ("stat.pt", "stat"), ("stats.jsonl", ""), ("count.json", "")):
        with pytest.raises(
            InputError, match="it holds counts of experts, not the experts of tokens"
        ) as caught:
            convert([tmp_path / name])
        assert kind in str(caught.value)
        assert "record per token" in str(caught.value)
    whole = tmp_path / "whole.pt"
    torch.save(dump, whole)
    np.testing.assert_array_equal(read_counts(tmp_path / "pass.pt"), read_counts(whole))
    assert read_counts(tmp_path / "stat.pt").tolist() == [[2] * 5] * 3
    assert read_counts(tmp_path / "stats.jsonl").tolist() == [[24, 2, 10], [2, 22, 4]]
    assert read_counts(tmp_path / "count.json").tolist() == [[1, 2], [3, 4]]
    assert read_counts(tmp_path / "counts.npy").tolist() == [[1, 2], [3, 4]]


def vllm_files(folder: Path, parts: list[np.ndarray]) -> list[Path]:
    """The same two sequences in every form that vLLM's answers take."""
    first, second = (part.astype(np.uint16) for part in parts)
    (folder / "a.npy").write_bytes(npy(first))
    (folder / "b.txt").write_text(text(second) + "\n")
    answer = {"id": "x", "choices": [{"routed_experts": text(first)}, {"routed_experts": second.tolist()}]}
    (folder / "answer.json").write_text(json.dumps(answer, indent=1))
    split = {"prompt_routed_experts": first[:2].tolist(), "choices": [{"routed_experts": text(first[2:])}]}
    lines = [split, {"routed_experts": text(second)}]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (folder / "list.json").write_text(json.dumps([text(first), text(second)]))
    return [folder / name for name in ("answer.json", "answers.jsonl", "list.json")]


def test_vllm_arrays_come_back(tmp_path: Path) -> None:
    ids = draw_ids(3, 9, 3, 12, 4)
    parts = [ids[:5], ids[5:]]
    for files in ([tmp_path / "a.npy", tmp_path / "b.txt"], *([f] for f in vllm_files(tmp_path, parts))):
        found = convert(files, num_experts=16)
        np.testing.assert_array_equal(found.routing.topk_ids, ids)
        assert found.routing.sequence_ids.tolist() == [0] * 5 + [1] * 4
        assert found.routing.num_experts == 16
        assert found.notes == ()
    assert "one more than the highest id" in convert([tmp_path / "a.npy"]).notes[0]


def test_dense_layers_of_vllm_are_left_out(tmp_path: Path) -> None:
    ids = draw_ids(4, 6, 3, 12, 4)
    (tmp_path / "a.npy").write_bytes(npy(np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1)))
    found = convert([tmp_path / "a.npy"], num_experts=12)
    np.testing.assert_array_equal(found.routing.topk_ids, ids)
    assert found.notes == ("layers without experts left out: 0",)


def test_exflow_traces_have_one_expert_a_token(tmp_path: Path) -> None:
    ids = draw_ids(5, 6, 3, 8, 1)
    np.save(tmp_path / "trace.npy", ids[:, :, 0].astype(np.int64))
    found = convert([tmp_path / "trace.npy"], num_experts=8)
    np.testing.assert_array_equal(found.routing.topk_ids, ids)


def test_files_join_with_their_own_sequences(tmp_path: Path) -> None:
    ids = draw_ids(6, 8, 2, 9, 3)
    for name, part in (("a", ids[:4]), ("b", ids[4:])):
        save_trace(tmp_path / f"{name}.npz", Routing(name, part, 9, np.array([3, 3, 5, 5], np.int32)))
    found = convert([tmp_path / "a.npz", tmp_path / "b.npz"])
    np.testing.assert_array_equal(found.routing.topk_ids, ids)
    assert found.routing.sequence_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", draw_ids(0, 4, 2, 9, 3))
    np.save(tmp_path / "b.npy", draw_ids(0, 4, 3, 9, 3))
    np.save(tmp_path / "c.npy", np.full((2, 2, 3), 70_000))
    np.save(tmp_path / "d.npy", np.zeros((2, 2, 3)))
    np.save(tmp_path / "e.npy", np.full((2, 2, 3), 4))
    (tmp_path / "f.bin").write_bytes(b"\x00\x01\x02")
    np.savez(tmp_path / "g.npz", other=np.ones(3))
    (tmp_path / "h.json").write_text('{"choices": [{"text": "hello"}]}')
    for names, experts, error in (
        ("ab", None, "b.npy: layers and top_k are (3, 3) of [(2, 3), (3, 3)]"),
        ("a", 2, "the model has 2 experts"),
        ("c", None, "expert ids reach from 70000 to 70000"),
        ("d", None, "it is float64 [2, 2, 3]"),
        ("e", None, "no token has distinct experts"),
        ("f", None, "it is no dump that is known"),
        ("g", None, "it is no dump that is known"),
        ("h", None, "no 'routed_experts' in it; hint: serve with --enable-return-routed-experts"),
        ("z", None, "there is no such file"),
        ("", None, "there are no files"),
    ):
        files = [next(tmp_path.glob(f"{n}.*"), tmp_path / n) for n in names]
        with pytest.raises(InputError) as caught:
            convert(files, num_experts=experts)
        assert error in str(caught.value)


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch fired",)


def test_pickles_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"logical_count": Bomb()}, "zip.pt")
    torch.save({"logical_count": Bomb()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps({"logical_count": Bomb()}))
    np.save("objects.npy", np.array([Bomb()]), allow_pickle=True)
    np.savez("objects.npz", allow_pickle=True, counts=np.array([Bomb()]), topk_ids=np.array([Bomb()]))
    Path("text.txt").write_text(base64.b64encode(Path("objects.npy").read_bytes()).decode())
    for name in ("zip.pt", "old.pt", "plain.pt", "objects.npy", "objects.npz", "text.txt"):
        for read in (read_counts, lambda path: convert([path])):
            with pytest.raises(InputError):
                read(Path(name))
    assert not Path("fired").exists()


def test_huge_tensors_are_refused_before_they_are_made(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    torch.save({"logical_count": torch.ones(1, 1, dtype=torch.int64).expand(10**6, 10**6)}, path)
    with pytest.raises(InputError, match="at most 4 GiB"):
        read_counts(path)


def test_corrupted_dumps_raise_nothing_but_input_errors(tmp_path: Path) -> None:
    ids = draw_ids(7, 12, 2, 8, 3)
    torch.save(sglang_dump(ids, 8, 2, PASSES), tmp_path / "dump.pt")
    vllm_files(tmp_path, [ids[:5], ids[5:]])
    sources = sorted(tmp_path.iterdir())
    rng, refused, total = random.Random(0), 0, 0
    for source in sources:
        whole, path = source.read_bytes(), tmp_path / "bad"
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.choice([0, 1, 1, 5])] = rng.randbytes(rng.choice([0, 1, 1, 3]))
            path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
            for read in (read_counts, lambda p: convert([p])):
                total += 1
                try:
                    read(path)
                except InputError as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert refused > total // 2


def test_fields_of_wrong_kinds(tmp_path: Path) -> None:
    ids = draw_ids(7, 12, 2, 8, 3)
    wrong = [
        None,
        3,
        "x",
        [],
        {},
        [[1, [2]]],
        torch.rand(2),
        torch.ones(2, 9),
        -torch.ones(3, 10, dtype=torch.int64),
    ]
    for key in (
        "records",
        "last_physical_to_logical_map",
        "topk_ids_of_layer",
        "positions",
        "extend_seq_lens",
    ):
        for value in wrong:
            dump = sglang_dump(ids, 8, 2, PASSES)
            (dump if key in dump else dump["records"][1])[key] = value
            torch.save(dump, tmp_path / "d.pt")
            try:
                found = convert([tmp_path / "d.pt"])
            except InputError:
                continue
            assert key in ("positions", "extend_seq_lens"), (key, value)
            np.testing.assert_array_equal(found.routing.topk_ids, ids)


SHARED = Path(os.environ.get("MOECC_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "routing"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded dumps are not here")
@pytest.mark.parametrize("name", ["1k1k", "1k8k"])
def test_recorded_dumps(name: str) -> None:
    path = SHARED / f"sglang_expert_distribution_256e_fp4_{name}.pt"
    counts = read_counts(path)
    want = torch.load(path, weights_only=True)["logical_count"].numpy()
    np.testing.assert_array_equal(counts, want)
    assert counts.shape == (61, 256)
    assert (counts.any(axis=1).nonzero()[0] == np.arange(3, 61)).all()
    with pytest.raises(InputError, match="a stat dump: it holds counts"):
        convert([path])


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = draw_ids(8, 12, 3, 10, 4)
    torch.save(sglang_dump(ids, 10, 2, PASSES), tmp_path / "dump.pt")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["moecc", "trace", "convert", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    out = tmp_path / "chat.npz"
    assert run(str(tmp_path / "dump.pt"), "-o", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "trace": str(out),
        "tokens": 12,
        "layers": 3,
        "top_k": 4,
        "experts": 10,
        "sequences": 3,
        "notes": ["layers without experts left out: 0"],
    }
    trace = load_trace(out)
    np.testing.assert_array_equal(trace.topk_ids, ids)
    assert trace.name == "chat"
    assert run(str(tmp_path / "dump.pt"), "-o", str(out)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 12 tokens, 3 layers, 4 top_k, 10 experts, 3 sequences",
        "note: layers without experts left out: 0",
    ]
    assert run(str(tmp_path / "absent.pt"), "-o", str(out)) == 2
    assert "there is no such file" in capsys.readouterr().err
