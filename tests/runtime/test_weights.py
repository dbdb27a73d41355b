"""Layers out of checkpoints that transformers wrote: the artifact's kernels compute what its own blocks compute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from family_cases import CASES, FAMILIES, feed_forward, fill

from moecc.artifact import Artifact
from moecc.driver import compile_model
from moecc.frontend.from_flags import spec_of
from moecc.frontend.hf_config import FAMILIES as KNOWN
from moecc.runtime.layer import compiled_module, forward, load_layer
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


@pytest.mark.parametrize("case", FAMILIES)
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
