"""model.yaml -> CompileSpec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from moecc.errors import InputError
from moecc.frontend import schema
from moecc.frontend.checks import closest_hint, placement_problems
from moecc.frontend.hf_config import load_hf_config, load_preset
from moecc.frontend.inline_model import inline_model
from moecc.frontend.schema_errors import first_error
from moecc.frontend.spec import (
    ClusterSpec,
    CompileSpec,
    ModelSpec,
    PlacementSpec,
    ServingSpec,
    Target,
    TokensPerDevice,
    WorkloadSpec,
)
from moecc.frontend.yaml_loader import Document, KeyPath, load_yaml
from moecc.solvers.placement.capacity import Capacity


def load_model_yaml(path: Path) -> CompileSpec:
    """Read and check a model.yaml; its paths are relative to the file itself.

    Device names are left to the driver, which knows the hardware (their place is `locations["cluster.device"]`).
    Errors: InputError for the first problem in the file: one line with file:line:column, what, and a hint.
    """
    path = Path(path)
    document = load_yaml(path)
    parsed = _validate(document)
    model = _model(parsed, document, path.parent)
    return compile_spec(parsed, model, _workloads(parsed, document, path.parent), document)


def compile_spec(
    parsed: schema.FileFields, model: ModelSpec, workloads: tuple[WorkloadSpec, ...], document: Document
) -> CompileSpec:
    """What is asked for beside the model, after checking what no schema can; `document` says where it stands."""
    cluster = ClusterSpec(**parsed.cluster.model_dump())
    placement, notes = _placement(parsed.placement, model, cluster.devices, document)
    for problem in placement_problems(placement, cluster, model.experts):
        where = document.value_at(tuple(problem.key.split(".")))
        raise InputError(problem.message, where=where, hint=problem.hint)
    if not workloads:
        workloads = (WorkloadSpec(name="uniform", routing="uniform"),)
        notes.append("no workloads are given: uniform routing is assumed")
    return CompileSpec(
        model=model,
        cluster=cluster,
        workloads=workloads,
        serving=_serving(parsed.serving),
        placement=placement,
        targets=_targets(parsed, document),
        notes=tuple(notes),
        source=document.file,
        locations=document.dotted(),
    )


def _validate(document: Document) -> schema.InlineFile | schema.HfFile | schema.PresetFile:
    kind: type[schema.InlineFile | schema.HfFile | schema.PresetFile] = schema.InlineFile
    model = document.data.get("model")
    if isinstance(model, dict):
        for key, with_key in (("hf_config", schema.HfFile), ("preset", schema.PresetFile)):
            if key in model:
                _only(model, key, document)
                kind = with_key
                break
    try:
        return kind.model_validate(document.data)
    except ValidationError as error:
        raise first_error(error, document, kind) from None


def _only(model: dict[str, object], key: str, document: Document) -> None:
    """hf_config or preset must be the whole model: a field beside it would silently contradict it."""
    known = {*schema.InlineModel.model_fields, "hf_config", "preset"}
    for other in model:
        if other in (key, "name"):
            continue
        where = document.keys[("model", other)]
        if other not in known:
            raise InputError(
                f"unknown key '{other}' in model", where=where, hint=closest_hint(other, [key, "name"])
            )
        raise InputError(
            f"'{other}' cannot stand beside '{key}'",
            where=where,
            hint=f"remove it, or remove {key} and write all fields of the model",
        )


def _model(
    parsed: schema.InlineFile | schema.HfFile | schema.PresetFile, document: Document, folder: Path
) -> ModelSpec:
    if isinstance(parsed, schema.InlineFile):
        return inline_model(parsed.model, document)
    if isinstance(parsed, schema.PresetFile):
        where = document.value_at(("model", "preset"))
        return load_preset(parsed.model.preset, where=where, model_name=parsed.model.name)
    config = _existing(folder, parsed.model.hf_config, document, ("model", "hf_config"), folder_too=True)
    return load_hf_config(config, name=parsed.model.name)


def _existing(folder: Path, text: str, document: Document, key: KeyPath, *, folder_too: bool = False) -> Path:
    path = folder / text
    try:
        if path.is_file() or (folder_too and path.is_dir()):
            return path
    except OSError:  # a name that the file system refuses
        pass
    raise InputError(
        f"there is no file '{text}'",
        where=document.value_at(key),
        hint=f"paths are relative to the folder of {Path(document.file).name}",
    )


def _workloads(parsed: schema.FileFields, document: Document, folder: Path) -> tuple[WorkloadSpec, ...]:
    workloads: list[WorkloadSpec] = []
    for index, item in enumerate(parsed.workloads):
        at: KeyPath = ("workloads", index)
        if item.name in [workload.name for workload in workloads]:
            raise InputError(
                f"the workload name '{item.name}' is used twice",
                where=document.value_at((*at, "name")),
                hint="give every workload its own name",
            )
        if (item.trace is None) == (item.routing is None):
            both = item.trace is not None
            raise InputError(
                f"workload '{item.name}' has {'both' if both else 'neither'} trace {'and' if both else 'nor'} routing",
                where=document.value_at((*at, "routing") if both else at),
                hint="give exactly one: trace: FILE.npz, or routing: uniform or zipf",
            )
        if item.alpha is not None and item.routing != "zipf":
            raise InputError(
                "alpha is for zipf routing only",
                where=document.value_at((*at, "alpha")),
                hint="remove it, or write routing: zipf",
            )
        workloads.append(
            WorkloadSpec(
                name=item.name,
                trace=_existing(folder, item.trace, document, (*at, "trace")) if item.trace else None,
                routing=item.routing,
                alpha=1.0 if item.alpha is None else item.alpha,
                weight=item.weight,
            )
        )
    return tuple(workloads)


def _placement(
    parsed: schema.PlacementFields, model: ModelSpec, devices: int, document: Document
) -> tuple[PlacementSpec, list[str]]:
    """Memory becomes slots, with a note that says so."""
    placement = PlacementSpec(**parsed.model_dump(exclude={"memory_per_device_gb"}))
    if parsed.memory_per_device_gb is None:
        return placement, []
    capacity = Capacity(
        memory_bytes=[parsed.memory_per_device_gb * 1e9],
        expert_bytes=model.expert_bytes,
        layers=len(model.moe_layers),
    )
    where = document.value_at(("placement", "memory_per_device_gb"))
    slots = capacity.slots_per_device(model.experts, devices, asked=placement.slots_per_device, where=where)
    return replace(placement, slots_per_device=slots), [capacity.note(slots)]


def _serving(parsed: schema.ServingFields) -> ServingSpec:
    return ServingSpec(
        execution=parsed.execution,
        tokens_per_device=TokensPerDevice(**parsed.tokens_per_device.model_dump()),
        context_length=parsed.context_length,
    )


def _targets(parsed: schema.FileFields, document: Document) -> tuple[Target, ...]:
    targets = parsed.targets or []
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise InputError(
                f"the target {target} is listed twice",
                where=document.value_at(("targets", index)),
                hint="remove one of them",
            )
    return tuple(targets)
