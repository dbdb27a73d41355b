"""What the module's attributes say about cluster and serving, read with the care that any input deserves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moecc.errors import InputError
from moecc.ir.core import Module


@dataclass(frozen=True, kw_only=True)
class Settings:
    """decode, prefill: tokens of one device in one step. context: tokens that a decode step attends to at most."""

    device: str
    nodes: int
    devices_per_node: int
    execution: str
    context: int
    decode: int
    prefill: int

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


def settings_of(module: Module) -> Settings:
    """Raises InputError that names the attribute that is missing or impossible."""
    cluster, serving = section(module, "cluster"), section(module, "serving")
    execution = _value(module, serving, "serving.execution", str)
    if execution not in ("home", "migrate"):
        raise _error(module, "serving.execution", "must be home or migrate")
    return Settings(
        device=_value(module, cluster, "cluster.device", str),
        nodes=_count(module, cluster, "cluster.nodes"),
        devices_per_node=_count(module, cluster, "cluster.devices_per_node"),
        execution=execution,
        context=_count(module, serving, "serving.context", minimum=0),
        decode=_count(module, serving, "serving.decode"),
        prefill=_count(module, serving, "serving.prefill"),
    )


def section(module: Module, name: str) -> dict[str, Any]:
    """A group of attributes. Raises InputError where it is missing."""
    found = module.attributes.get(name)
    if not isinstance(found, dict):
        raise _error(module, name, "is missing")
    return found


def _value(module: Module, group: dict[str, Any], path: str, kind: type) -> Any:
    value = group.get(path.rpartition(".")[2])
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _error(
            module, path, f"must be {kind.__name__}, not {value!r}" if value is not None else "is missing"
        )
    return value


def _count(module: Module, group: dict[str, Any], path: str, minimum: int = 1) -> int:
    value: int = _value(module, group, path, int)
    if value < minimum:
        raise _error(module, path, f"must be at least {minimum}, not {value}")
    return value


def _error(module: Module, path: str, what: str) -> InputError:
    return InputError(
        f"attribute {path} {what}",
        where=f"module @{module.name}",
        hint="see the attributes that an import writes",
    )
