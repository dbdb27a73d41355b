"""From lowered IR to the kernel sets that are emitted: equal ones once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moecc.codegen.config import LayerShape
from moecc.errors import InputError
from moecc.ir.core import Function, Module
from moecc.ir.semantics import Activation, Router

Entry = Literal["forward", "distributed", "experts"]
_ENTRIES: Mapping[str, Entry] = {"forward": "forward", "distributed": "distributed", "experts": "experts"}


@dataclass(frozen=True, kw_only=True)
class KernelSet:
    """Kernels of one layer shape, emitted as one module named after the first function that needs it.

    entry: how functions call it: `forward` (router and experts on one device), `distributed` (router at home,
    experts where the rows arrive) or `experts` (a routing that is known: shared experts that stay apart).
    """

    name: str
    entry: Entry
    shape: LayerShape
    used_by: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"kernels/{self.name}.py"


def kernel_sets(module: Module) -> list[KernelSet]:
    """The distinct kernel sets of a lowered module, in the order of its functions."""
    found: dict[tuple[Entry, LayerShape], list[str]] = {}
    for function in module.functions:
        for description in function.attributes.get("kernels", []):
            try:
                key = (_ENTRIES[description["entry"]], layer_shape(description))
                name = str(description["name"])
            except (KeyError, TypeError) as error:
                hint = "run the pass 'fuse' before 'lower'"
                message = f"@{function.name} describes kernels that cannot be emitted ({error})"
                raise InputError(message, where=function.location, hint=hint) from None
            found.setdefault(key, []).append(name)
    return [
        KernelSet(name=names[0], entry=entry, shape=shape, used_by=tuple(names))
        for (entry, shape), names in found.items()
    ]


def kernel_set(sets: Sequence[KernelSet], function: Function, suffix: str = "") -> KernelSet | None:
    """The set that a function uses: its own, or the one of a suffix as in `_shared`."""
    return next((s for s in sets if function.name + suffix in s.used_by), None)


def layer_shape(description: Mapping[str, Any]) -> LayerShape:
    """The shape that the pass `lower` described. Raises KeyError or TypeError where the description is not whole."""
    plain = {key: value for key, value in description.items() if key not in ("name", "entry")}
    activation = plain["activation"]
    return LayerShape(
        **plain
        | {
            "router": Router(**plain.get("router", {})),
            "activation": Activation(
                kind=activation["activation"], alpha=activation["alpha"], limit=activation["limit"]
            ),
        }
    )
