"""What the flags of `moecc place` name, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moecc.errors import InputError
from moecc.files import read_text
from moecc.frontend.trace import load_trace
from moecc.solvers.placement import Placement
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing


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


def read_placement(path: Path) -> Placement:
    text = read_text(path, "give a placement.json, as `moecc place -o` writes it")
    return Placement.from_json(text, where=str(path))


def model_step_cost(
    *,
    preset: str | None,
    hf_config: Path | None,
    device: str,
    devices: int,
    nodes: int,
    slots: int,
    tokens_per_device: int,
    routing: Routing,
) -> tuple[StepCost, str]:
    """The cost of the named model's expert layer on the named device, and how far it is to be trusted."""
    from moecc.frontend.hf_config import load_hf_config, load_preset
    from moecc.frontend.trace import check_trace
    from moecc.hardware import Cluster, load_device
    from moecc.passes.step_cost import step_cost

    if (preset is None) == (hf_config is None):
        raise InputError(
            "the predicted time needs a model",
            where="--objective step",
            hint="give --preset deepseek-v3, or --hf-config config.json",
        )
    if tokens_per_device < 1:
        raise InputError(
            f"{tokens_per_device} is not positive", where="--tokens-per-device", hint="use 1 or more"
        )
    per_node = devices_per_node(devices, nodes)
    model = load_hf_config(hf_config) if hf_config else load_preset(str(preset), where="--preset")
    check_trace(routing, model, "--preset" if preset else "--hf-config")
    cluster = Cluster(device=load_device(device), nodes=nodes, devices_per_node=per_node)
    cost = step_cost(
        cluster,
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        top_k=model.top_k,
        slots=slots,
        dtype=model.dtype,
        tokens_per_device=tokens_per_device,
    )
    return cost, cluster.device.confidence()
