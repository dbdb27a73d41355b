"""What the flags of `moecc place` name, read and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moecc.errors import InputError
from moecc.files import check_writable, read_text
from moecc.frontend.trace import load_trace
from moecc.solvers.placement import Placement
from moecc.solvers.placement.capacity import Capacity
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing

if TYPE_CHECKING:
    from moecc.frontend.spec import ModelSpec
    from moecc.solvers.placement.homes import Unit


def read_workloads(traces: Sequence[str], weights: Sequence[float]) -> tuple[Routing, ...]:
    """FILE or NAME=FILE each, with a weight each or none at all."""
    if weights and len(weights) != len(traces):
        raise InputError(
            f"{len(weights)} weights for {len(traces)} traces",
            where="--weight",
            hint="give one for each trace, in their order, or none",
        )
    routings = []
    for index, trace in enumerate(traces):
        name, equals, file = trace.partition("=")
        named = bool(equals) and bool(name) and not Path(trace).exists()
        routing = load_trace(Path(file), name) if named else load_trace(Path(trace))
        routings.append(replace(routing, weight=weights[index] if weights else 1.0))
    names = [routing.name for routing in routings]
    for name in names:
        if names.count(name) > 1:
            hint = f"name them: one={name}.npz two={name}.npz"
            raise InputError(f"two traces are named {name!r}", where="moecc place", hint=hint)
    return tuple(routings)


def devices_per_node(devices: int, nodes: int) -> int:
    if nodes < 1 or devices < 1 or devices % nodes:
        raise InputError(
            f"{devices} devices cannot be spread evenly over {nodes} nodes",
            where="--nodes",
            hint="devices must be a multiple of nodes",
        )
    return devices // nodes


def read_links(path: Path, devices: int, nodes: int) -> Links:
    """nvidia-smi's table of one host, or a matrix over all devices, by the file's ending."""
    text = read_text(path, "give the text of `nvidia-smi topo -m`, or a cost matrix as .json or .csv")
    per_node, where = devices_per_node(devices, nodes), str(path)
    if path.suffix == ".json":
        links = Links.from_json(text, per_node, where=where)
    elif path.suffix == ".csv":
        links = Links.from_csv(text, per_node, where=where)
    else:
        links = Links.from_topology(text, nodes=nodes, where=where)
    if links.devices != devices:
        raise InputError(
            f"it joins {links.devices} devices, not {devices}",
            where=where,
            hint="a table of nvidia-smi is one host: set --nodes; a matrix holds all devices",
        )
    return links


def read_homes(homes: str) -> Unit | None:
    """None for random ones."""
    if homes in ("sequence", "token"):
        return cast("Unit", homes)
    if homes != "random":
        raise InputError(
            f"homes {homes!r} are unknown", where="--homes", hint="use random, sequence or token"
        )
    return None


def read_placement(path: Path) -> Placement:
    text = read_text(path, "give a placement.json, as `moecc place -o` writes it")
    return Placement.from_json(text, where=str(path))


def read_model(preset: str | None, hf_config: Path | None, routing: Routing) -> ModelSpec | None:
    """The model that the traces are of, if one is named."""
    from moecc.frontend.hf_config import load_hf_config, load_preset
    from moecc.frontend.trace import check_trace

    if preset is None and hf_config is None:
        return None
    if preset is not None and hf_config is not None:
        raise InputError("two models are named", where="--preset", hint="give --preset or --hf-config")
    model = load_hf_config(hf_config) if hf_config else load_preset(str(preset), where="--preset")
    check_trace(routing, model, "--preset" if preset else "--hf-config")
    return model


def expert_bytes(expert_mb: float | None, model: ModelSpec | None) -> int:
    """Weights of one expert of one layer: as given, or the model's; 0 where nobody says."""
    if expert_mb is not None:
        if not (math.isfinite(expert_mb) and expert_mb > 0):
            raise InputError(
                f"{expert_mb} is not a size", where="--expert-mb", hint="give 1e6 bytes, such as 17.3"
            )
        return round(expert_mb * 1e6)
    return 0 if model is None else model.expert_bytes


def slots_that_fit(
    memory_gb: Sequence[float], asked: int | None, expert_bytes: int, routing: Routing, devices: int
) -> tuple[int, list[str]]:
    """Slots per device, as asked for, as memory allows, or as few as possible; and notes on them."""
    if not memory_gb:
        return -(-routing.num_experts // devices) if asked is None else asked, []
    capacity = Capacity(
        memory_bytes=[size * 1e9 for size in memory_gb], expert_bytes=expert_bytes, layers=routing.layers
    )
    slots = capacity.slots_per_device(
        routing.num_experts, devices, asked=asked, where="--memory-per-device-gb"
    )
    return slots, [capacity.note(slots)]


def model_step_cost(
    model: ModelSpec | None, *, device: str, devices: int, nodes: int, slots: int, tokens_per_device: int
) -> tuple[StepCost, str]:
    """The cost of the model's expert layer on the named device, and how far it is to be trusted."""
    from moecc.hardware import Cluster, load_device
    from moecc.passes.step_cost import step_cost

    if model is None:
        raise InputError(
            "the predicted time needs a model",
            where="--objective step",
            hint="give --preset deepseek-v3, or --hf-config config.json",
        )
    if tokens_per_device < 1:
        raise InputError(
            f"{tokens_per_device} is not positive", where="--tokens-per-device", hint="use 1 or more"
        )
    cluster = Cluster(
        device=load_device(device), nodes=nodes, devices_per_node=devices_per_node(devices, nodes)
    )
    cost = step_cost(
        cluster,
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        top_k=model.top_k,
        slots=slots,
        dtype=model.dtype,
        tokens_per_device=tokens_per_device,
        gated=model.activation.gated,
    )
    return cost, cluster.device.confidence()


@dataclass(frozen=True, kw_only=True)
class Exports:
    """Engines' files to write. moe_layers: the model's layer of every row; layers_total: with the dense ones."""

    files: tuple[tuple[str, Path], ...]
    layers_total: int
    moe_layers: tuple[int, ...]

    def write(self, placement: Placement) -> list[str]:
        """Each file's line on how to launch its engine. Raises InputError where an engine cannot do it."""
        from moecc.engines import export_placement

        return [
            f"{path} ({engine}): {export_placement(placement, self.layers_total, self.moe_layers, engine, path)}"
            for engine, path in self.files
        ]


def read_exports(
    wanted: Sequence[str], dense_layers: Sequence[int], model: ModelSpec | None, layers: int
) -> Exports:
    """ENGINE:FILE each. The model says which of its layers are dense, or dense_layers do."""
    from moecc.engines.formats import format_named

    files = []
    for item in wanted:
        engine, colon, file = item.partition(":")
        if not colon or not file:
            raise InputError(f"{item!r} names no file", where="--export", hint="use sglang:FILE")
        format_named(engine)
        check_writable(Path(file))
        files.append((engine, Path(file)))
    if model is not None:
        return Exports(files=tuple(files), layers_total=model.layers, moe_layers=model.moe_layers)
    total = layers + len(set(dense_layers))
    moe_layers = tuple(sorted(set(range(total)) - set(dense_layers)))
    if len(moe_layers) != layers:
        raise InputError(
            f"{list(dense_layers)} are not layers of a model of {total}",
            where="--dense-layer",
            hint=f"give layers in [0, {total})",
        )
    return Exports(files=tuple(files), layers_total=total, moe_layers=moe_layers)
