"""The IR's structure: modules of functions of operations in straight-line SSA form.

An op is declared as a class body:

    class Gate(Op, mnemonic="moe.gate"):
        x = operand(TokensType)
        weight = operand(WeightsType)
        logits = result()
        scale = attr(float, default=1.0)

Operands are named in the text form, results have the types that `infer` computes from operands and attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

from moecc.errors import InputError, Location
from moecc.ir.types import Type

Attribute = int | float | bool | str | list[Any] | dict[str, Any]
A = TypeVar("A", int, float, bool, str, list[Any], dict[str, Any])
R = TypeVar("R")


class Value:
    """An SSA value: a function argument (`op` is None) or a result of `op`."""

    def __init__(self, name: str, type: Type, op: Op | None = None) -> None:
        self.name, self.type, self.op = name, type, op


@dataclass(frozen=True)
class Field(Generic[R]):
    """A declared operand or result of an op class; reads as the value(s) bound to it."""

    kind: str
    types: tuple[type[Type], ...]
    arity: str
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Field[R]: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> R: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Field[R] | R:
        if op is None:
            return self
        bound = (op.operands if self.kind == "operand" else op.results).get(self.name, ())
        if self.arity == "many":
            return cast(R, bound)
        return cast(R, bound[0] if bound else None)


def operand(*types: type[Type]) -> Field[Value]:
    return Field("operand", types, "one")


def optional(*types: type[Type]) -> Field[Value | None]:
    return Field("operand", types, "optional")


def operands(*types: type[Type]) -> Field[tuple[Value, ...]]:
    return Field("operand", types, "many")


def result() -> Field[Value]:
    return Field("result", (), "one")


def optional_result() -> Field[Value | None]:
    """A result that `infer` leaves out by None in its place."""
    return Field("result", (), "optional")


def results() -> Field[tuple[Value, ...]]:
    """Any number of results; the only result field of its op."""
    return Field("result", (), "many")


@dataclass(frozen=True)
class AttributeField(Generic[A]):
    """A declared attribute: its type, its bounds, its default (None: it must be given)."""

    kind: type[A]
    default: A | None
    min: float | None
    max: float | None
    one_of: tuple[str, ...]
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    @overload
    def __get__(self, op: None, owner: type[Op]) -> AttributeField[A]: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> A: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> AttributeField[A] | A:
        return self if op is None else cast(A, op.attributes[self.name])

    def why_invalid(self, value: object) -> str | None:
        wanted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.kind is not bool):
            return f"must be {self.kind.__name__}, not {type(value).__name__}"
        if self.one_of and value not in self.one_of:
            return f"must be one of {', '.join(self.one_of)}"
        if isinstance(value, (int, float)):
            if self.min is not None and value < self.min:
                return f"must be at least {self.min:g}"
            if self.max is not None and value > self.max:
                return f"must be at most {self.max:g}"
        return None


def attr(
    kind: type[A],
    *,
    default: A | None = None,
    min: float | None = None,
    max: float | None = None,
    one_of: tuple[str, ...] = (),
) -> AttributeField[A]:
    return AttributeField(kind, default, min, max, one_of)


class Op:
    """Base of all operations. Subclasses declare fields and `infer` the types of their results.

    `tasks` names the tasks of the schedule that the op carries out; they follow it through fusion and lowering.
    """

    mnemonic: ClassVar[str] = ""
    operand_fields: ClassVar[tuple[Field[Any], ...]] = ()
    result_fields: ClassVar[tuple[Field[Any], ...]] = ()
    attribute_fields: ClassVar[tuple[AttributeField[Any], ...]] = ()
    tasks = attr(list, default=[])

    def __init_subclass__(cls, mnemonic: str) -> None:
        cls.mnemonic = mnemonic
        members = [member for base in reversed(cls.__mro__) for member in vars(base).values()]
        fields = [member for member in members if isinstance(member, Field)]
        cls.operand_fields = tuple(f for f in fields if f.kind == "operand")
        cls.result_fields = tuple(f for f in fields if f.kind == "result")
        attributes = [member for member in members if isinstance(member, AttributeField)]
        cls.attribute_fields = tuple(sorted(attributes, key=lambda declared: declared.name == "tasks"))

    def __init__(
        self,
        operands: Mapping[str, Value | None | Sequence[Value]],
        attributes: Mapping[str, Any] | None = None,
        *,
        names: Sequence[str] = (),
        location: Location | None = None,
    ) -> None:
        """Builds the op and its results; `names` name the results, else the declared names do.

        Raises InputError when an operand is missing or of a wrong type, or an attribute is invalid.
        """
        self.location = location
        self.operands = {name: _as_tuple(bound) for name, bound in operands.items() if bound is not None}
        self.attributes: dict[str, Any] = dict(attributes or {})
        for declared in self.attribute_fields:
            if declared.default is not None:
                self.attributes.setdefault(declared.name, copy(declared.default))
        check_fields(self)
        self.results = self._make_results()
        for value, name in zip(self.all_results, names, strict=False):
            value.name = name

    def infer(self) -> tuple[Type | None, ...]:
        """Types of the results, in declaration order; None for an optional result that is absent."""
        raise NotImplementedError

    def _make_results(self) -> dict[str, tuple[Value, ...]]:
        types = self.infer()
        if self.result_fields and self.result_fields[0].arity == "many":
            name = self.result_fields[0].name
            return {name: tuple(Value(f"{name}{i}", t, self) for i, t in enumerate(types) if t is not None)}
        named = zip(self.result_fields, types, strict=True)
        return {f.name: (Value(f.name, t, self),) for f, t in named if t is not None}

    @property
    def all_operands(self) -> tuple[Value, ...]:
        return tuple(value for bound in self.operands.values() for value in bound)

    @property
    def all_results(self) -> tuple[Value, ...]:
        return tuple(value for bound in self.results.values() for value in bound)

    def rebuilt(self, values: Mapping[Value, Value], attributes: Mapping[str, Any] | None = None) -> Op:
        """The same op on other operands (those not in `values` stay), its result types inferred anew."""
        mapped = {name: [values.get(v, v) for v in bound] for name, bound in self.operands.items()}
        names = [value.name for value in self.all_results]
        changed = {**self.attributes, **(attributes or {})}
        return type(self)(mapped, changed, names=names, location=self.location)

    def fail(self, message: str, hint: str | None = None) -> InputError:
        """The error to raise about this op."""
        return InputError(f"{self.mnemonic}: {message}", where=self.location, hint=hint)


def _as_tuple(bound: Value | Sequence[Value] | None) -> tuple[Value, ...]:
    if bound is None:
        return ()
    return (bound,) if isinstance(bound, Value) else tuple(bound)


def check_fields(op: Op) -> None:
    """Operands and attributes are those that the op declares. Raises InputError."""
    declared = {f.name: f for f in op.operand_fields}
    for name in op.operands:
        if name not in declared:
            raise op.fail(f"unknown operand {name!r}", f"operands are {', '.join(declared) or 'none'}")
    for operand_field in op.operand_fields:
        bound = op.operands.get(operand_field.name, ())
        if operand_field.arity == "one" and len(bound) != 1:
            raise op.fail(f"operand {operand_field.name!r} is missing")
        for value in bound:
            if not isinstance(value.type, operand_field.types):
                wanted = " or ".join(t.__name__.removesuffix("Type").lower() for t in operand_field.types)
                raise op.fail(f"operand {operand_field.name!r} must be {wanted}, not {value.type}")
    known = {f.name for f in op.attribute_fields}
    for name in op.attributes:
        if name not in known:
            raise op.fail(
                f"unknown attribute {name!r}", f"attributes are {', '.join(sorted(known)) or 'none'}"
            )
    for attribute in op.attribute_fields:
        if attribute.name not in op.attributes:
            raise op.fail(f"attribute {attribute.name!r} is missing")
        if (why := attribute.why_invalid(op.attributes[attribute.name])) is not None:
            raise op.fail(f"attribute {attribute.name!r} {why}")


OpT = TypeVar("OpT", bound=Op)


@dataclass
class Function:
    """One layer (or several equal ones): arguments, ops in order, returned values."""

    name: str
    arguments: list[Value]
    ops: list[Op] = field(default_factory=list)
    returns: list[Value] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    location: Location | None = None

    def argument(self, name: str) -> Value:
        return next(value for value in self.arguments if value.name == name)

    def first(self, *kinds: type[OpT]) -> OpT | None:
        """The first op of one of the kinds."""
        return next(self.every(*kinds), None)

    def every(self, *kinds: type[OpT]) -> Iterator[OpT]:
        return (op for op in self.ops if isinstance(op, kinds))


@dataclass
class Module:
    """A model: functions, and what all of them share as attributes (cluster, serving, placement)."""

    name: str
    functions: list[Function] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


class Builder:
    """Appends ops to a function; `builder(Gate, x=…, weight=…)` returns the first result."""

    def __init__(self, function: Function, location: Location | None = None) -> None:
        self.function, self.location = function, location

    def __call__(self, kind: type[Op], attributes: Mapping[str, Any] | None = None, **operands: Any) -> Value:
        op = kind(operands, attributes, location=self.location)
        self.function.ops.append(op)
        return op.all_results[0]
