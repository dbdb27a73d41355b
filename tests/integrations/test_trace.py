"""moecc.trace on batches as data loaders hand them out, against the model run on each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

import moecc
from moecc.errors import InputError
from moecc.frontend.trace import load_trace
from moecc.integrations.routing_recorder import record_routing

LENGTHS = (7, 3, 11, 5)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=8,
        num_experts_per_tok=3,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.OlmoeForCausalLM(config)


def sequences() -> list[torch.Tensor]:
    return [torch.randint(2, 64, (length,)) for length in LENGTHS]


def alone(model: Any, texts: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.concatenate([record_routing(model, [text[None]], "x").topk_ids for text in texts])


def padded(texts: list[torch.Tensor], *, left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    ids, mask = (
        torch.zeros(len(texts), width, dtype=torch.int64),
        torch.zeros(len(texts), width, dtype=torch.int64),
    )
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_left_out_and_changes_nothing(model: Any, left: bool) -> None:
    texts = sequences()
    loader = [padded(texts[:2], left=left), padded(texts[2:], left=left)]
    found = moecc.trace(model, loader, name="chat")
    assert found.name == "chat"
    assert found.sequence_ids.tolist() == np.repeat(range(4), LENGTHS).tolist()
    np.testing.assert_array_equal(found.topk_ids, alone(model, texts))


def test_every_form_of_a_batch_is_the_same_batch(model: Any) -> None:
    ids = torch.randint(2, 64, (6, 9))
    want = alone(model, list(ids))
    labels = torch.zeros(6)
    for loader in (
        [ids],
        [ids.int()],
        list(ids),
        [{"input_ids": ids}],
        [transformers.BatchEncoding({"input_ids": ids, "labels": labels})],
        [(ids, labels)],
        [[{"input_ids": ids}, labels]],
        DataLoader(TensorDataset(ids, labels), batch_size=4),
    ):
        np.testing.assert_array_equal(moecc.trace(model, loader).topk_ids, want)


def test_a_limit_is_kept_to_the_token_and_reads_no_further(model: Any) -> None:
    ids = torch.randint(2, 64, (2, 5))

    def endless() -> Any:
        yield ids
        yield ids
        raise AssertionError("read too far")

    found = moecc.trace(model, endless(), tokens=13)
    assert found.topk_ids.shape == (13, 2, 3)
    assert found.sequence_ids.tolist() == [0] * 5 + [1] * 5 + [2] * 3


def test_a_saved_trace_is_read_back(model: Any, tmp_path: Path) -> None:
    found = moecc.trace(model, [torch.randint(2, 64, (2, 5))])
    moecc.save_trace(tmp_path / "chat.npz", found)
    again = load_trace(tmp_path / "chat.npz")
    np.testing.assert_array_equal(again.topk_ids, found.topk_ids)
    assert again.name == "chat"


def test_the_model_stays_as_it_was(model: Any) -> None:
    model.train()
    moecc.trace(model, [torch.randint(2, 64, (2, 5))])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


IDS = torch.zeros(2, 3, dtype=torch.int64)
FORM = "; hint: a batch is token ids [sequences, length], a dict with input_ids, or a tuple that starts with either"


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([IDS, {"ids": IDS}], "batch 1: has no input_ids among ['ids']" + FORM),
        (["text"], "batch 0: token ids: a str, not a tensor" + FORM),
        ([[1, 2]], "batch 0: token ids: a list, not a tensor" + FORM),
        ([()], "batch 0: token ids: a tuple, not a tensor" + FORM),
        ([{"input_ids": None}], "batch 0: holds no token ids but None" + FORM),
        ([IDS.float()], "batch 0: holds no token ids but torch.float32" + FORM),
        ([IDS[None]], "batch 0: token ids have 3 dimensions" + FORM),
        (
            [{"input_ids": IDS, "attention_mask": IDS[:1]}],
            "batch 0: attention_mask is [1, 3], input_ids [2, 3]; hint: give both one shape",
        ),
        ([], "no text to record; hint: give at least one batch of tokens"),
        (
            [{"input_ids": IDS, "attention_mask": IDS}],
            "no text to record; hint: give at least one batch of tokens",
        ),
    ],
)
def test_other_batches_are_refused(model: Any, loader: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        moecc.trace(model, loader)
    assert str(error.value) == message


def test_a_limit_of_nothing_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="^tokens: 0 is out of range; hint: record at least one token$"):
        moecc.trace(model, [IDS], tokens=0)
