"""What a measurement depends on: where it was made (`Environment`) and of what (`Key`). What is left out collides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

from moecc.autotune.canonical import Scalar, canonical, digest, is_scalar
from moecc.codegen.config import LayerShape
from moecc.errors import InputError

MAX_FIELDS = 64
NOT_STATED = "not stated"
"""What a file of another tuner, from which a record was imported, does not say; `_SIZES` are 0 then."""
_SIZES = ("cores", "hidden", "top_k")
_Identity = TypeVar("_Identity", "Environment", "Key")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A device with its software: times compare within one environment only.

    device: the name that the driver reports. cores: SMs, CUs, or the CPU cores that the process may use.
    features: instructions beyond the arch, sorted. driver, assembler: versions of what loads kernels and of what
    assembles them. kernel_source: a hash. measurement: name and version of the policy of timing.
    Raises InputError for a field that is empty or not of its type.
    """

    device: str
    arch: str
    cores: int
    features: tuple[str, ...]
    driver: str
    assembler: str
    triton: str
    kernel_source: str
    measurement: str

    def __post_init__(self) -> None:
        _check_fields(self)
        object.__setattr__(self, "features", tuple(sorted(self.features)))

    @cached_property
    def hash(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Key:
    """What was tuned: one op of one layer, as one device computes it, for a bucket of token counts.

    experts, intermediate: those of this device. quant: how weights are quantised, "none" if they are not.
    layout: how weights lie in memory. routing: class of the routing distribution.
    options: all else of the layer that changes the kernels.
    Raises InputError for a field that is empty or not of its type.
    """

    op: str
    kernel: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: str
    weight_dtype: str
    quant: str
    layout: str
    activation: str
    routing: str
    options: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fields(self)

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def hash(self) -> str:
        return digest(asdict(self))


def layer_key(
    shape: LayerShape, *, op: str, kernel: str, routing: str, quant: str = "none", layout: str = "rows"
) -> Key:
    """The key of moecc's kernels for a layer; shape.tokens is the bucket. Every field of the shape is in it."""
    known = {"tokens", "hidden", "intermediate", "top_k", "dtype", "activation"}
    options: dict[str, Scalar] = {}
    for item in fields(shape):
        if item.name not in known:
            value = getattr(shape, item.name)
            options[item.name] = value if is_scalar(value) else canonical(asdict(value)).decode()
    return Key(
        op=op,
        kernel=kernel,
        experts=shape.held_experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        top_k=shape.top_k,
        tokens=shape.tokens,
        dtype=shape.dtype,
        weight_dtype=shape.dtype,
        quant=quant,
        layout=layout,
        activation=canonical(asdict(shape.activation)).decode(),
        routing=routing,
        options=options,
    )


def environment_of(value: Any) -> Environment:
    """The environment of a parsed JSON object. ValueError where it is none."""
    return _identity_of(Environment, value)


def key_of(value: Any) -> Key:
    """The key of a parsed JSON object. ValueError where it is none."""
    return _identity_of(Key, value)


def _identity_of(kind: type[_Identity], value: Any) -> _Identity:
    if not isinstance(value, dict) or set(value) != {item.name for item in fields(kind)}:
        raise ValueError(f"not the fields of {kind.__name__.lower()}")
    plain: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in value.items()}
    try:
        return kind(**plain)
    except (InputError, TypeError) as error:
        raise ValueError(str(error)) from None


def _check_fields(identity: Environment | Key) -> None:
    for item in fields(identity):
        value = getattr(identity, item.name)
        if item.type == "int":
            least = 0 if item.name in _SIZES and _is_imported(identity) else 1
            right = type(value) is int and value >= least and is_scalar(value)
        elif item.type == "str":
            right = isinstance(value, str) and value != "" and is_scalar(value)
        else:
            right = _is_collection(value)
        if not right:
            where = f"{type(identity).__name__.lower()} {item.name}"
            what = f"{str(value)[:40]!r} identifies nothing"
            raise InputError(what, where=where, hint=f"it needs a value of type {item.type}")


def _is_imported(identity: Environment | Key) -> bool:
    policy = identity.measurement if isinstance(identity, Environment) else identity.layout
    return policy == NOT_STATED


def _is_collection(value: Any) -> bool:
    if not isinstance(value, (Mapping, tuple)) or len(value) > MAX_FIELDS:
        return False
    if isinstance(value, Mapping) and not all(is_scalar(item) for item in value.values()):
        return False
    return all(isinstance(text, str) and is_scalar(text) for text in value)
