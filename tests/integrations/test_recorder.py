"""The recorder against the routers' own logits, on tiny random models of five families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.integrations.routing_recorder import (
    experts_modules,
    read_text_workload,
    record,
    record_routing,
    text_encoder,
    text_files,
)

transformers = pytest.importorskip("transformers")

EXPERTS, TOP_K = 8, 3
COMMON = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": None,
}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}, 3),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 16}, 3),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}, 3),
    "deepseek_v3": (
        "DeepseekV3",
        MLA
        | {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        2,
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 16}, 3),
}


def tiny(family: str) -> Any:
    prefix, fields, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | fields))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight", "router.bias")):
            torch.nn.init.normal_(parameter)  # some start at zero, where every choice is a tie
    return model.eval()


@pytest.fixture(scope="module")
def olmoe() -> Any:
    return tiny("olmoe")


def chosen_by_logits(model: Any, batch: torch.Tensor) -> np.ndarray:
    """The k largest router logits of every token, as ascending ids: [tokens, layers, k]."""
    layers: list[np.ndarray] = []

    def choose(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        hidden = args[0].detach().double().reshape(-1, COMMON["hidden_size"]).numpy()
        logits = hidden @ module.weight.detach().double().numpy().T
        if getattr(module, "bias", None) is not None:
            logits = logits + module.bias.detach().double().numpy()
        layers.append(np.sort(np.argsort(-logits, axis=1)[:, :TOP_K], axis=1))

    routers = [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]
    handles = [router.register_forward_hook(choose) for router in routers]
    with torch.no_grad():
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return np.stack(layers, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_experts_are_those_of_the_largest_logits(family: str) -> None:
    model = tiny(family)
    batches = [torch.randint(0, 256, (2, 7)), torch.randint(0, 256, (3, 5))]
    routing = record_routing(model, batches, "random")
    expected = np.concatenate([chosen_by_logits(model, batch) for batch in batches])
    assert expected.shape == (29, FAMILIES[family][2], TOP_K)
    np.testing.assert_array_equal(np.sort(routing.topk_ids, axis=2), expected)
    assert routing.topk_ids.dtype == np.int16
    assert routing.num_experts == EXPERTS
    np.testing.assert_array_equal(routing.sequence_ids, [0] * 7 + [1] * 7 + [2] * 5 + [3] * 5 + [4] * 5)
    assert routing.assumption == ""


def test_ids_keep_the_order_of_the_router(olmoe: Any) -> None:
    batch = torch.randint(0, 256, (2, 6))
    with torch.no_grad():
        logits = olmoe(input_ids=batch, output_router_logits=True).router_logits
    expected = torch.stack([layer.topk(TOP_K).indices for layer in logits], dim=1)
    np.testing.assert_array_equal(record_routing(olmoe, [batch], "x").topk_ids, expected)


def test_the_model_is_left_as_it_was(olmoe: Any) -> None:
    olmoe.train()
    batch = torch.randint(0, 256, (1, 4))
    record_routing(olmoe, [batch], "x")
    with pytest.raises(IndexError):
        record_routing(olmoe, [torch.full((1, 4), 999)], "outside the vocabulary")
    assert olmoe.training
    assert not any(module._forward_pre_hooks for module in experts_modules(olmoe).values())
    olmoe.eval()


def test_a_layer_that_misses_tokens_is_an_error() -> None:
    model = tiny("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts: the layer saw 0 tokens of 4"):
        record_routing(model, [torch.zeros(1, 4, dtype=torch.long)], "x")


def test_a_dense_model_is_an_error() -> None:
    fields = {key: value for key, value in COMMON.items() if key != "num_experts_per_tok"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    with pytest.raises(InputError, match=r"LlamaForCausalLM: no experts module to record; hint: "):
        record_routing(model, [torch.zeros(1, 4, dtype=torch.long)], "x")


def test_no_batches_is_an_error(olmoe: Any) -> None:
    with pytest.raises(InputError, match="no text to record"):
        record_routing(olmoe, [], "x")


def test_folders_are_walked_for_visible_text_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.py", "b/1.md", "a.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "b" / "image.png").write_bytes(b"PNG\0")
    found = [path.relative_to(tmp_path).as_posix() for path in text_files([tmp_path])]
    assert found == ["a.txt", "b/1.md", "b/2.py"]
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        list(text_files([tmp_path / "nowhere"]))


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_windows_are_spaced_over_all_files_and_span_none(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"aaaabbbbcc")
    (tmp_path / "2").write_bytes(b"ddddeeee\xff")
    windows = read_text_workload([tmp_path], as_bytes, length=4, limit=11)
    assert [bytes(window.tolist()) for window in windows] == [b"aaaa", b"dddd"]
    everything = read_text_workload([tmp_path], as_bytes, length=4, limit=16)
    assert bytes(everything.flatten().tolist()) == b"aaaabbbbddddeeee"


def test_bytes_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"a\xffb")
    windows = read_text_workload([tmp_path / "1"], as_bytes, length=5, limit=5)
    assert bytes(windows[0].tolist()).decode() == "a\N{REPLACEMENT CHARACTER}b"


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"a" * 9)
    with pytest.raises(
        InputError, match=r"hold 2 sequences of 4 tokens, 3 are asked for; hint: .* at most 8"
    ):
        read_text_workload([tmp_path], as_bytes, length=4, limit=12)
    with pytest.raises(InputError, match="3 tokens are less than one sequence of 4"):
        read_text_workload([tmp_path], as_bytes, length=4, limit=3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("abcdefghij ", max_size=40), min_size=1, max_size=4),
    length=st.integers(1, 9),
    limit=st.integers(1, 60),
)
def test_windows_are_distinct_pieces_of_the_text(
    tmp_path: Path, texts: list[str], length: int, limit: int
) -> None:
    files = [tmp_path / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    pieces = [text[i : i + length] for text in texts for i in range(0, len(text) - length + 1, length)]
    wanted = limit // length
    if not 1 <= wanted <= len(pieces):
        with pytest.raises(InputError):
            read_text_workload(files, as_bytes, length=length, limit=limit)
        return
    windows = read_text_workload(files, as_bytes, length=length, limit=limit)
    found = [bytes(window.tolist()).decode() for window in windows]
    remaining = iter(pieces)
    assert len(found) == wanted
    assert all(window in remaining for window in found)  # in order, none twice


def test_a_tokenizer_in_the_folder_is_used(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert text_encoder(tmp_path, 3)("two one three") == [2, 1, 0]


def test_without_a_tokenizer_only_bytes_will_do(tmp_path: Path) -> None:
    assert text_encoder(tmp_path, 258)("aé") == [97, 195, 169]
    with pytest.raises(InputError, match="no tokenizer, and a vocabulary of 32000 tokens"):
        text_encoder(tmp_path, 32000)


def test_a_checkpoint_folder_is_recorded(tmp_path: Path, olmoe: Any) -> None:
    checkpoint, text = tmp_path / "checkpoint", tmp_path / "text"
    olmoe.save_pretrained(checkpoint)
    text.write_text("Now is the time for all good men to come to the aid of the party. " * 4)
    routing = record(checkpoint, [text], tokens=70, sequence_length=16, name="pangram")
    windows = read_text_workload([text], as_bytes, length=16, limit=70)
    np.testing.assert_array_equal(
        np.sort(routing.topk_ids, axis=2), np.concatenate([chosen_by_logits(olmoe, w[None]) for w in windows])
    )
    assert routing.name == "pangram"


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json in this folder"):
        record(tmp_path, [tmp_path], tokens=4, sequence_length=4, name="x")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "vocab_size": 256}')
    with pytest.raises(InputError, match="transformers cannot load it"):
        record(tmp_path, [tmp_path], tokens=4, sequence_length=4, name="no weights")
    (tmp_path / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(InputError, match="transformers cannot load it"):
        record(tmp_path, [tmp_path], tokens=4, sequence_length=4, name="unknown family")


def test_importing_the_recorder_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, moecc.integrations.routing_recorder; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
