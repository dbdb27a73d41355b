"""Layers out of checkpoints that transformers wrote: the artifact's kernels compute what its own blocks compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from family_cases import CASES, FAMILIES, feed_forward, fill

from moecc.artifact import Artifact
from moecc.driver import compile_model
from moecc.errors import InputError
from moecc.frontend.from_flags import spec_of
from moecc.frontend.hf_config import FAMILIES as KNOWN
from moecc.runtime.layer import compiled_module, forward, load_layer
from moecc.runtime.run import run_artifact
from moecc.runtime.weight_names import NAMES

TOKENS = 37


def save_model(case: str, folder: Path, *, published: bool = True, **options: Any) -> Any:
    """A model with random weights in every tensor, saved in float32 under the published names or transformers'."""
    model = CASES[case].model()
    for layer in model.base_model.layers:
        fill(feed_forward(layer), torch.Generator().manual_seed(3))
    model.save_pretrained(folder, save_original_format=published, **options)
    return model


def compiled(folder: Path, out: Path, devices: int = 1) -> Artifact:
    spec = spec_of(model=None, hf_config=folder, preset=None, device="x86", nodes=1, devices_per_node=devices)
    return compile_model(spec, out).artifact


def expected(model: Any, index: int, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = feed_forward(model.base_model.layers[index])(x[None])
    return (found[0] if isinstance(found, tuple) else found).reshape(x.shape)


def output(artifact: Artifact, x: torch.Tensor, **options: Any) -> torch.Tensor:
    layer = load_layer(artifact, tokens=len(x), generator=torch.Generator(), **options)
    return forward(layer, x).out


def test_every_family_that_compiles_has_names() -> None:
    assert set(NAMES) == set(KNOWN)


# Each stands for a form: separate, shared behind a gate, transposed and interleaved, without a gate.
QUICK = ("mixtral", "qwen2", "gpt-oss", "nemotron-h")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES]
)
def test_a_layer_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    """Under both sets of names, in float32."""
    model = save_model(case, tmp_path / "published")
    save_model(case, tmp_path / "fused", published=False)
    artifact = compiled(tmp_path / "published", tmp_path / "out")
    index = max(
        f.attributes["layers"][-1] for f in compiled_module(artifact).functions if f.attributes.get("kernels")
    )
    x = torch.randn(TOKENS, model.config.hidden_size)
    wanted = expected(model, index, x)
    for checkpoint in (tmp_path / "published", tmp_path / "fused"):
        found = output(artifact, x, index=index, checkpoint=checkpoint)
        assert (found - wanted).norm() / wanted.norm() < 1e-5, checkpoint.name


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Artifact]:
    """A model of layers 0, 1 and 3 with experts, on two devices; its checkpoint in shards."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = save_model("qwen3-raw", folder / "checkpoint", max_shard_size="60KB")
    assert len(list((folder / "checkpoint").glob("*.safetensors"))) > 2
    return model, folder / "checkpoint", compiled(folder / "checkpoint", folder / "out", devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 3])
def test_every_layer_can_be_chosen_and_is_placed_by_its_own_row(qwen3: Any, index: int) -> None:
    model, checkpoint, artifact = qwen3
    rows = artifact.json("placement.json")["physical_to_logical_map"]
    x = torch.randn(TOKENS, model.config.hidden_size)
    wanted = expected(model, index, x)
    assert (output(artifact, x, index=index, checkpoint=checkpoint) - wanted).norm() / wanted.norm() < 1e-5
    layer = load_layer(
        artifact, tokens=TOKENS, generator=torch.Generator(), index=index, checkpoint=checkpoint
    )
    assert layer.ranks is not None
    assert layer.ranks.slots.flatten().tolist() == rows[[0, 1, 3].index(index)]


def test_a_run_on_a_checkpoint_is_checked(qwen3: Any) -> None:
    _, checkpoint, artifact = qwen3
    result = run_artifact(artifact, tokens=16, check=True, layer=3, weights=checkpoint)
    assert result.passed
    assert (result.layer, result.weights) == (3, f"{checkpoint}, float32")


def test_the_command_says_what_it_ran_on(qwen3: Any) -> None:
    _, checkpoint, artifact = qwen3
    command = [sys.executable, "-m", "moecc", "run", artifact.folder, "--weights", checkpoint, "--check"]
    ran = subprocess.run([*command, "--layer", "1"], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert lines[0] == f"weights: layer 1 of {checkpoint}, float32"
    assert lines[1].startswith("moe_decode: 16 tokens on 2 ranks in turn, ")
    assert any(line.endswith(": ok") for line in lines)


def test_only_the_layer_is_read(qwen3: Any, tmp_path: Path) -> None:
    """Shards that hold nothing of the layer may be missing."""
    model, checkpoint, artifact = qwen3
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    mine = {file for name, file in index["weight_map"].items() if name.startswith("model.layers.3.mlp.")}
    assert mine < set(index["weight_map"].values())
    for file in (*mine, "model.safetensors.index.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    x = torch.randn(TOKENS, model.config.hidden_size)
    torch.testing.assert_close(
        output(artifact, x, index=3, checkpoint=tmp_path), output(artifact, x, index=3, checkpoint=checkpoint)
    )
    with pytest.raises(InputError, match=r"\.safetensors: is missing; hint: download the checkpoint again$"):
        output(artifact, x, index=0, checkpoint=tmp_path)


def test_rounding_is_said(qwen3: Any, tmp_path: Path) -> None:
    model, _, artifact = qwen3
    model.double().save_pretrained(tmp_path)
    result = run_artifact(artifact, tokens=4, check=False, weights=tmp_path)
    model.float()
    assert result.weights == f"{tmp_path}, float64 rounded to float32"


def single(checkpoint: Path, folder: Path, change: Any) -> Path:
    """The checkpoint as one file whose tensors went through `change`."""
    tensors = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    folder.mkdir()
    save_file(change(tensors), folder / "model.safetensors")
    return folder


EXPERT = "model.layers.0.mlp.experts"
FIT = "; hint: give a checkpoint of the model that was compiled"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {name: x for name, x in t.items() if not name.endswith("mlp.gate.weight")},
            "1 tensor is missing: model.layers.0.mlp.gate.weight" + FIT + ", not quantised",
        ),
        (
            lambda t: {name: x for name, x in t.items() if ".experts.1" not in name},
            f"21 tensors are missing: {EXPERT}.1.gate_proj.weight, {EXPERT}.1.up_proj.weight, "
            f"{EXPERT}.1.down_proj.weight, …" + FIT + ", not quantised",
        ),
        (
            lambda t: {**t, f"{EXPERT}.5.up_proj.weight": torch.zeros(24, 31)},
            f"1 tensor does not fit the layer: {EXPERT}.5.up_proj.weight is [24, 31], not [24, 32]" + FIT,
        ),
        (
            lambda t: {name: x for name, x in t.items() if "layers.0." not in name},
            "holds no tensors of layer 0; hint: their names start with model.layers.0. or backbone.layers.0. or "
            "layers.0.",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    qwen3: Any, tmp_path: Path, change: Any, message: str
) -> None:
    _, checkpoint, artifact = qwen3
    folder = single(checkpoint, tmp_path / "other", change)
    with pytest.raises(InputError) as error:
        run_artifact(artifact, tokens=4, check=False, weights=folder)
    assert str(error.value) == f"{folder}: {message}"


def test_a_quantised_checkpoint_is_refused(qwen3: Any, tmp_path: Path) -> None:
    _, checkpoint, artifact = qwen3
    name = f"{EXPERT}.0.up_proj.weight"
    folder = single(checkpoint, tmp_path / "fp8", lambda t: {**t, name: t[name].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError) as error:
        run_artifact(artifact, tokens=4, check=False, weights=folder)
    assert str(error.value) == (
        f"{folder}/model.safetensors: {name} is stored as F8_E4M3; hint: give a checkpoint that is not quantised: "
        "float64, float32, bfloat16, float16"
    )


def damaged(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "README.md",
            b"",
            ": holds neither model.safetensors nor model.safetensors.index.json; hint: give the folder",
        ),
        ("model.safetensors", b"no", "/model.safetensors: is no safetensors file ("),
        (
            "model.safetensors.index.json",
            b"[]",
            "/model.safetensors.index.json: is no index of a checkpoint; hint: ",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"model.layers.0.x": "../x.safetensors"}}',
            "/model.safetensors.index.json: names a file outside its folder: ../x.safetensors; hint: do not use it",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    qwen3: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = damaged(tmp_path / "checkpoint", name, content)
    with pytest.raises(InputError) as error:
        run_artifact(qwen3[2], tokens=4, check=False, weights=folder)
    assert str(error.value).startswith(f"{folder}{message}")


def test_a_layer_without_experts_cannot_be_chosen(qwen3: Any) -> None:
    with pytest.raises(
        InputError, match="^--layer: layer 2 has no experts; hint: layers with experts: 0-1, 3$"
    ):
        run_artifact(qwen3[2], tokens=4, check=False, layer=2)
