"""What makes a spec impossible: one predicate for each kind, shared by every format that yields the spec."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moecc.errors import InputError, Location
from moecc.frontend.spec import ClusterSpec, ModelSpec, PlacementSpec, locate
from moecc.ir.semantics import Router

MAX_EXPERTS = 32_767  # expert ids are int16 in traces and in Routing
MAX_TOP_K = 256
MAX_LAYERS = 4_096
MAX_SIZE = 1 << 24
MAX_DEVICES = 1 << 16


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the attribute it is about, what, and how to mend it."""

    key: str
    message: str
    hint: str


def closest_hint(word: str, known: Iterable[str]) -> str:
    """The hint for a word that is not known."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"


def check_model(model: ModelSpec, where: Location | str) -> ModelSpec:
    """The model itself, or an InputError at the first problem's location (`where` if it has none)."""
    for problem in model_problems(model):
        raise InputError(
            problem.message, where=locate(model.locations, problem.key, where), hint=problem.hint
        )
    return model


def model_problems(model: ModelSpec) -> Iterator[Problem]:
    """Everything that is impossible about a model, the most telling first."""
    if model.top_k > model.experts:
        yield Problem(
            "top_k",
            f"top_k {model.top_k} is larger than experts {model.experts}",
            f"top_k must be in [1, {min(model.experts, MAX_TOP_K)}]",
        )
    yield from _size_problems(model)
    if not model.moe_layers:
        yield Problem("moe_layers", "the model has no MoE layer", "moecc compiles models with MoE layers")
    yield from _router_problems(model.router, model.experts, model.top_k)
    yield from _attention_problems(model)


def _size_problems(model: ModelSpec) -> Iterator[Problem]:
    sizes: list[tuple[str, int | None, int, int]] = [
        ("experts", model.experts, 1, MAX_EXPERTS),
        ("top_k", model.top_k, 1, MAX_TOP_K),
        ("layers", model.layers, 1, MAX_LAYERS),
        ("hidden_size", model.hidden_size, 1, MAX_SIZE),
        ("intermediate_size", model.intermediate_size, 1, MAX_SIZE),
        ("dense_intermediate_size", model.dense_intermediate_size, 1, MAX_SIZE),
        ("vocab_size", model.vocab_size, 1, MAX_SIZE),
        ("shared_experts.count", model.shared_experts.count, 0, MAX_EXPERTS),
        ("shared_experts.intermediate_size", model.shared_experts.intermediate_size, 0, MAX_SIZE),
    ]
    for key, value, low, high in sizes:
        if value is not None and not low <= value <= high:
            yield Problem(key, f"{key} {value} is out of range", f"{key} must be in [{low}, {high}]")
    if model.shared_experts.gated and model.shared_experts.count != 1:
        yield Problem(
            "shared_experts.gated",
            f"a gate weights one shared expert, not {model.shared_experts.count}",
            "write count: 1 and the width of all, or remove gated",
        )
    if model.activation.kind == "clamped_swiglu" and not (0 < model.activation.limit < math.inf):
        yield Problem("activation", "the clamp limit must be positive", "gpt-oss uses limit 7.0")


def _router_problems(router: Router, experts: int, top_k: int) -> Iterator[Problem]:
    if router.groups < 1 or experts % router.groups:
        yield Problem(
            "router.groups",
            f"groups {router.groups} do not divide experts {experts}",
            f"groups must be one of {', '.join(map(str, _divisors(experts)))}",
        )
        return
    size = experts // router.groups
    if not 1 <= router.top_groups <= router.groups:
        yield Problem(
            "router.top_groups",
            f"top_groups {router.top_groups} is larger than groups {router.groups}",
            f"top_groups must be in [1, {router.groups}]",
        )
    if top_k > router.top_groups * size:
        yield Problem(
            "router.top_groups",
            f"top_k {top_k} is larger than the {router.top_groups * size} experts of top_groups "
            f"{router.top_groups}",
            f"top_groups must be at least {-(-top_k // size)}",
        )
    if router.groups > 1 and router.group_score == "top2_sum" and size < 2:
        yield Problem(
            "router.groups", "groups of one expert have no top-2 sum", f"use at most {experts // 2} groups"
        )
    if router.select_first and (router.groups > 1 or router.selection_bias or router.normalize):
        yield Problem(
            "router.select_first",
            "select_first scores the selected logits only: groups, selection bias and normalize do not apply",
            "remove them, or remove select_first",
        )
    if router.score == "sparsemixer" and (router.select_first or router.selection_bias or router.groups > 1):
        yield Problem(
            "router.score",
            "sparsemixer takes experts by their logits alone: select_first, selection bias and groups do not apply",
            "remove them, or use another score",
        )
    if router.score == "sparsemixer" and router.normalize:
        yield Problem("router.normalize", "sparsemixer's weights are never normalised", "remove normalize")
    if not 0 <= router.jitter < math.inf:
        yield Problem(
            "router.jitter", f"jitter {router.jitter:g} is out of range", "jitter must be 0 or larger"
        )
    elif router.jitter and router.score != "sparsemixer":
        yield Problem("router.jitter", f"jitter has no effect on {router.score}", "write score: sparsemixer")
    for key, value in (("norm_eps", router.norm_eps), ("norm_min", router.norm_min)):
        if not 0 <= value < math.inf:
            yield Problem(f"router.{key}", f"{key} {value:g} is out of range", f"{key} must be 0 or larger")
        elif value and not router.normalize:
            yield Problem(f"router.{key}", f"{key} has no effect without normalize", "add normalize: true")
    if not 0 < router.scale < math.inf:
        yield Problem("router.scale", f"scale {router.scale:g} is out of range", "scale must be positive")


def _divisors(number: int) -> list[int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return divisors if len(divisors) <= 12 else [*divisors[:11], divisors[-1]]


def _attention_problems(model: ModelSpec) -> Iterator[Problem]:
    attention = model.attention
    if attention is None:
        return
    needed = ["heads", "kv_heads", "head_dim"]
    if attention.kind == "mla":
        needed += ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"]
    for name in needed:
        if not 1 <= getattr(attention, name) <= MAX_SIZE:
            yield Problem(
                f"attention.{name}",
                f"{attention.kind} attention needs {name}",
                f"{name} must be in [1, {MAX_SIZE}]",
            )
            return
    if attention.heads % attention.kv_heads:
        yield Problem(
            "attention.kv_heads",
            f"kv_heads {attention.kv_heads} do not divide heads {attention.heads}",
            "every KV head serves the same number of query heads",
        )


def placement_problems(placement: PlacementSpec, cluster: ClusterSpec, experts: int) -> Iterator[Problem]:
    """What is impossible about a placement of `experts` on a cluster; keys are paths of model.yaml."""
    if cluster.devices > MAX_DEVICES:
        yield Problem(
            "cluster.nodes", f"{cluster.devices} devices are too many", f"at most {MAX_DEVICES} are supported"
        )
    slots, least = placement.slots_per_device, -(-experts // cluster.devices)
    if slots is not None and slots < least:
        yield Problem(
            "placement.slots_per_device",
            f"slots_per_device {slots} on {cluster.devices} devices cannot hold {experts} experts",
            f"slots_per_device must be in [{least}, {experts}]",
        )
    if slots is not None and slots > experts:
        yield Problem(
            "placement.slots_per_device",
            f"slots_per_device {slots} is larger than experts {experts}",
            f"slots_per_device must be in [{least}, {experts}]",
        )
