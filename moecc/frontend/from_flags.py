"""A CompileSpec without a YAML: a config.json or a preset, a cluster by flags, everything else by default."""

from __future__ import annotations

from pathlib import Path

from moecc.errors import InputError
from moecc.frontend.checks import placement_problems
from moecc.frontend.hf_config import load_hf_config, load_preset
from moecc.frontend.spec import ClusterSpec, CompileSpec, ModelSpec, PlacementSpec, WorkloadSpec

MAX_IMBALANCE = 1.15


def spec_from_config(path: Path, *, device: str, nodes: int, devices_per_node: int) -> CompileSpec:
    """The model of a Hugging Face config.json, or of a folder that holds one. Raises InputError."""
    file = path / "config.json" if path.is_dir() else path
    return _spec(load_hf_config(file), str(file), device, nodes, devices_per_node)


def spec_from_preset(name: str, *, device: str, nodes: int, devices_per_node: int) -> CompileSpec:
    """A model that moecc knows by name. Raises InputError for an unknown one."""
    return _spec(load_preset(name, where="--preset"), f"preset {name}", device, nodes, devices_per_node)


def _spec(model: ModelSpec, source: str, device: str, nodes: int, devices_per_node: int) -> CompileSpec:
    for flag, value in (("--nodes", nodes), ("--devices-per-node", devices_per_node)):
        if value < 1:
            raise InputError(f"{value} is not positive", where=flag, hint="use 1 or more")
    cluster = ClusterSpec(device=device, nodes=nodes, devices_per_node=devices_per_node)
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
