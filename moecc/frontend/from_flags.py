"""Which model the command line names: a model.yaml, a config.json or a preset, the latter with a cluster by flags."""

from __future__ import annotations

from pathlib import Path

from moecc.errors import InputError
from moecc.frontend.checks import placement_problems
from moecc.frontend.hf_config import load_hf_config, load_preset
from moecc.frontend.model_yaml import load_model_yaml
from moecc.frontend.spec import ClusterSpec, CompileSpec, ModelSpec, PlacementSpec, WorkloadSpec

MAX_IMBALANCE = 1.15
DEFAULTS: dict[str, str | int] = {"device": "h100-sxm", "nodes": 1, "devices_per_node": 8}


def spec_of(
    *, model: Path | None, hf_config: Path | None, preset: str | None, **cluster: str | int | None
) -> CompileSpec:
    """The one model that is named; `cluster` holds the flags of DEFAULTS, None where not given.

    Raises InputError for none or several models, and for cluster flags beside a YAML, which has its own.
    """
    given = [source for source in (model, hf_config, preset) if source is not None]
    if len(given) != 1:
        hint = "moecc compile model.yaml, or --hf-config config.json, or --preset qwen3-30b-a3b"
        raise InputError(f"{len(given)} models given, not one", where="moecc compile", hint=hint)
    flags = {name: value for name, value in cluster.items() if value is not None}
    if model is not None:
        for name in flags:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                "cannot stand beside a model.yaml", where=flag, hint="change cluster in the YAML"
            )
        return load_model_yaml(model)
    chosen = _cluster(DEFAULTS | flags)
    if hf_config is not None:
        file = hf_config / "config.json" if hf_config.is_dir() else hf_config
        return _spec(load_hf_config(file), str(file), chosen)
    return _spec(load_preset(str(preset), where="--preset"), f"preset {preset}", chosen)


def _cluster(flags: dict[str, str | int]) -> ClusterSpec:
    nodes, devices_per_node = int(flags["nodes"]), int(flags["devices_per_node"])
    for flag, value in (("--nodes", nodes), ("--devices-per-node", devices_per_node)):
        if value < 1:
            raise InputError(f"{value} is not positive", where=flag, hint="use 1 or more")
    return ClusterSpec(device=str(flags["device"]), nodes=nodes, devices_per_node=devices_per_node)


def _spec(model: ModelSpec, source: str, cluster: ClusterSpec) -> CompileSpec:
    placement = PlacementSpec(max_imbalance=MAX_IMBALANCE)
    for problem in placement_problems(placement, cluster, model.experts):
        raise InputError(problem.message, where=source, hint=problem.hint)
    return CompileSpec(
        model=model,
        cluster=cluster,
        workloads=(WorkloadSpec(name="uniform", routing="uniform"),),
        placement=placement,
        notes=("no workloads are given: uniform routing is assumed",),
        source=source,
        locations={"cluster.device": "--device", "targets": "--target"},
    )
