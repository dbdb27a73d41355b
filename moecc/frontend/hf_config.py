"""Hugging Face config.json -> ModelSpec, and the presets, which are such files shipped with moecc."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from moecc.errors import InputError, Location
from moecc.frontend.checks import check_model, closest_hint
from moecc.frontend.families import (
    base,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    jamba,
    minimax_m2,
    mixtral,
    nemotron_h,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from moecc.frontend.fields import Fields, JsonObject, load_json, parse_json
from moecc.frontend.spec import ModelSpec

FAMILIES: Mapping[str, Callable[[JsonObject, str], ModelSpec]] = {
    "mixtral": mixtral.read,
    "qwen2_moe": qwen2_moe.read,
    "qwen3_moe": qwen3_moe.read,
    "olmoe": olmoe.read,
    "deepseek_v2": deepseek_v2.read,
    "deepseek_v3": deepseek_v3.read,
    "kimi_k2": deepseek_v3.read,
    "glm4_moe": glm4_moe.read,
    "gpt_oss": gpt_oss.read,
    "granitemoe": granitemoe.read,
    "phimoe": phimoe.read,
    "ernie4_5_moe": ernie4_5_moe.read,
    "minimax_m2": minimax_m2.read,
    "jamba": jamba.read,
    "nemotron_h": nemotron_h.read,
}

INLINE_FIELDS = "hidden_size, moe_layers, experts, top_k, intermediate_size, router"


def load_hf_config(path: Path, *, name: str | None = None) -> ModelSpec:
    """The model of a config.json, or of a folder that holds one.

    name: defaults to the config's own `_name_or_path`, else to the folder's name.
    Errors: InputError with line and column for malformed JSON and for wrong or impossible values; one that names
    every missing field; one that lists the known families for an unknown `model_type`.
    """
    file = path / "config.json" if path.is_dir() else path
    return model_of(load_json(file), name=name, fallback=file.absolute().parent.name)


def model_of(document: JsonObject, *, name: str | None, fallback: str) -> ModelSpec:
    """The model of a parsed config.json, see `load_hf_config`."""
    fields = Fields(document, base.KEYS)
    family = document.data.get("model_type")
    if not isinstance(family, str):
        raise InputError(
            "model_type is missing",
            where=fields.at("model_type"),
            hint=f"known families: {', '.join(FAMILIES)}; or write the fields inline: {INLINE_FIELDS}",
        )
    if family not in FAMILIES:
        raise InputError(
            f"unknown family '{family}' (known: {', '.join(FAMILIES)})",
            where=fields.at("model_type"),
            hint=f"write the fields inline: {INLINE_FIELDS}",
        )
    model = FAMILIES[family](document, name or base.default_name(fields, fallback or family))
    return check_model(model, document.file)


def preset_names() -> tuple[str, ...]:
    """Public models that moecc knows by name, sorted."""
    folder = resources.files("moecc.frontend") / "presets"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load_preset(
    name: str, *, where: Location | str | None = None, model_name: str | None = None
) -> ModelSpec:
    """The model of a preset. Errors: InputError at `where` for an unknown name, with the closest one as a hint."""
    if name not in preset_names():
        raise InputError(f"unknown preset '{name}'", where=where, hint=closest_hint(name, preset_names()))
    raw = (resources.files("moecc.frontend") / "presets" / f"{name}.json").read_bytes()
    return model_of(parse_json(raw, f"preset {name}"), name=model_name or name, fallback=name)
