"""What `moecc compile` does, for a model that is at hand in Python: `moecc.compile_model`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moecc import driver
from moecc.artifact import Artifact, sha256
from moecc.errors import InputError
from moecc.frontend import schema
from moecc.frontend.fields import JsonObject
from moecc.frontend.hf_config import model_of
from moecc.frontend.model_yaml import compile_spec
from moecc.frontend.schema_errors import first_error
from moecc.frontend.spec import ClusterSpec, WorkloadSpec
from moecc.frontend.yaml_loader import Document, KeyPath
from moecc.solvers.routing import Routing

CALL = "compile_model"


def compile_model(
    model: Any,
    *,
    cluster: ClusterSpec | Mapping[str, Any],
    output: str | Path,
    traces: Sequence[Routing | str | Path] | Mapping[str, Routing | str | Path] = (),
    serving: Mapping[str, Any] | None = None,
    placement: Mapping[str, Any] | None = None,
    targets: Sequence[str] | None = None,
) -> Artifact:
    """Compiles a transformers model, or its config, into the artifact folder `output`, all or nothing.

    Only the config and the dtype of a model are looked at. cluster, serving, placement and targets are those of
    model.yaml, as mappings with its keys. traces: routings that `moecc.trace` recorded, or paths of .npz files, under
    their own names or those of a mapping; without any, uniform routing is assumed and the report says so.
    Raises InputError that names the argument which is wrong, MoeccError for work that failed; what stood at `output`
    is then untouched.
    """
    given = {"cluster": cluster, "serving": serving, "placement": placement, "targets": targets}
    document = _document({name: _plain(value) for name, value in given.items() if value is not None})
    try:
        parsed = schema.FileFields.model_validate(document.data)
    except ValidationError as error:
        raise first_error(error, document, schema.FileFields) from None
    config = _config(model)
    named = _named(traces)
    spec = compile_spec(
        parsed,
        model_of(config, name=None, fallback=type(model).__name__),
        tuple(_workload(name, trace) for name, trace in named),
        document,
    )
    digests = {"config.json": sha256(json.dumps(config.data, sort_keys=True).encode())}
    digests |= {f"trace:{name}": _digest(trace) for name, trace in named if isinstance(trace, Routing)}
    places = {f"workloads.{index}.trace": f"traces[{name!r}]" for index, (name, _) in enumerate(named)}
    spec = replace(spec, digests=digests, locations={**spec.locations, **places})
    return driver.compile_model(spec, Path(output)).artifact


def _document(data: dict[str, Any]) -> Document:
    """The arguments as a model.yaml without a model; every place in it is the argument's."""
    places = {path: _dotted(path) for path in _paths(data, ())}
    return Document(file=CALL, data={"moecc": 1, **data}, values=places, keys={(): CALL, **places})


def _paths(value: object, path: KeyPath) -> Iterator[KeyPath]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _paths(item, (*path, key))


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, which is what the schema takes."""
    if isinstance(value, ClusterSpec):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _config(model: Any) -> JsonObject:
    """The config.json that transformers would write for the model, in the dtype that the model has now."""
    config = getattr(model, "config", model)
    if not hasattr(config, "to_json_string"):
        raise InputError(
            f"a {type(model).__name__} has no config",
            where="model",
            hint="give a transformers model or its config",
        )
    data = json.loads(config.to_json_string())
    if config is not model:
        data["dtype"] = str(model.dtype).removeprefix("torch.")
    return JsonObject(file="model.config", data=data, locations={})


def _named(
    traces: Sequence[Routing | str | Path] | Mapping[str, Routing | str | Path],
) -> list[tuple[str, Routing | Path]]:
    """Every trace with its name. Raises InputError for a name that two have and for what is no trace."""
    if isinstance(traces, (Routing, str, Path)):
        raise InputError(
            f"a {type(traces).__name__}, not a list of traces", where="traces", hint="write traces=[...]"
        )
    items = traces.items() if isinstance(traces, Mapping) else ((None, trace) for trace in traces)
    found: list[tuple[str, Routing | Path]] = []
    for given, trace in items:
        if not isinstance(trace, (Routing, str, Path)):
            raise InputError(
                f"a {type(trace).__name__} is no trace",
                where=f"traces[{len(found)}]",
                hint="give what moecc.trace returned, or the path of an .npz file",
            )
        kept = trace if isinstance(trace, Routing) else Path(trace)
        name = given or (kept.name if isinstance(kept, Routing) else kept.stem)
        if name in dict(found):
            raise InputError(
                f"the workload name {name!r} is used twice",
                where=f"traces[{len(found)}]",
                hint="name them: traces={'chat': ..., 'code': ...}",
            )
        found.append((name, kept))
    return found


def _workload(name: str, trace: Routing | Path) -> WorkloadSpec:
    return WorkloadSpec(name=name, trace=trace, weight=trace.weight if isinstance(trace, Routing) else 1.0)


def _digest(routing: Routing) -> str:
    return sha256(routing.topk_ids.tobytes() + routing.sequence_ids.tobytes())
