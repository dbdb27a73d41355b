"""Types of IR values. Token counts may be symbolic: `T` is the number of tokens a device starts a layer with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from moecc.errors import InputError

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "int8": 1,
}


@dataclass(frozen=True)
class Dim:
    """`coefficient * T` when symbolic, else the plain integer `coefficient`."""

    coefficient: Fraction
    symbolic: bool = True

    def times(self, factor: Fraction | int) -> Dim:
        return Dim(self.coefficient * factor, self.symbolic)

    def at(self, tokens: int) -> float:
        """The size when T is `tokens`."""
        return float(self.coefficient * (tokens if self.symbolic else 1))

    def __str__(self) -> str:
        if not self.symbolic:
            return str(self.coefficient)
        return "T" if self.coefficient == 1 else f"{self.coefficient}*T"


TOKENS = Dim(Fraction(1))


def fixed(size: int) -> Dim:
    return Dim(Fraction(size), symbolic=False)


@dataclass(frozen=True)
class Type:
    """Base of all types; `str` is the text form that the parser reads back."""


@dataclass(frozen=True)
class TokensType(Type):
    """Activations, one row a token (or a token's copy for one expert): [rows, hidden]."""

    rows: Dim
    hidden: int
    dtype: str

    def __str__(self) -> str:
        return f"tokens<{self.rows} x {self.hidden} x {self.dtype}>"


@dataclass(frozen=True)
class TensorType(Type):
    shape: tuple[Dim, ...]
    dtype: str

    def __str__(self) -> str:
        return f"tensor<{' x '.join(map(str, self.shape))} x {self.dtype}>"


@dataclass(frozen=True)
class WeightsType(Type):
    """Parameters: [experts, out, in] for expert matrices, [out, in] or [out] otherwise."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size

    def __str__(self) -> str:
        return f"weights<{' x '.join(map(str, self.shape))} x {self.dtype}>"


@dataclass(frozen=True)
class RoutingType(Type):
    """Expert ids (int32) and weights (float32), both [tokens, top_k].

    On rows received from other devices `top_k` is the mean number of experts that are local, a fraction.
    """

    tokens: Dim
    top_k: Fraction
    experts: int

    @property
    def assignments(self) -> Dim:
        """Rows of the expert GEMMs: tokens * top_k."""
        return self.tokens.times(self.top_k)

    def __str__(self) -> str:
        return f"routing<{self.tokens} x {self.top_k} of {self.experts}>"


@dataclass(frozen=True)
class PlanType(Type):
    """Assignments sorted by expert, with the map from GEMM tiles to (expert, first row)."""

    rows: Dim
    experts: int

    def __str__(self) -> str:
        return f"plan<{self.rows} of {self.experts}>"


def _dim(text: str) -> Dim:
    match = re.fullmatch(r"(?:(\d+(?:/\d+)?)\*)?T|(\d+)", text)
    if match is None:
        raise InputError(f"{text!r} is not a size", hint="sizes look like 128, T or 8*T")
    if match[2]:
        return fixed(int(match[2]))
    return Dim(Fraction(match[1] or 1))


def _integer(text: str) -> int:
    if not text.isdigit():
        raise InputError(f"{text!r} is not an integer", hint="only token counts may be symbolic")
    return int(text)


def _dtype(text: str) -> str:
    if text not in DTYPE_BYTES:
        raise InputError(f"unknown dtype {text!r}", hint=f"dtypes are {', '.join(DTYPE_BYTES)}")
    return text


def _tokens(fields: list[str]) -> Type:
    rows, hidden, dtype = fields
    return TokensType(_dim(rows), _integer(hidden), _dtype(dtype))


def _routing(fields: list[str]) -> Type:
    tokens, rest = fields
    top_k, experts = rest.split(" of ")
    return RoutingType(_dim(tokens), Fraction(top_k), _integer(experts))


def _plan(fields: list[str]) -> Type:
    rows, experts = fields[0].split(" of ")
    return PlanType(_dim(rows), _integer(experts))


_PARSERS: dict[str, Callable[[list[str]], Type]] = {
    "tokens": _tokens,
    "tensor": lambda fields: TensorType(tuple(map(_dim, fields[:-1])), _dtype(fields[-1])),
    "weights": lambda fields: WeightsType(tuple(map(_integer, fields[:-1])), _dtype(fields[-1])),
    "routing": _routing,
    "plan": _plan,
}


def parse_type(text: str) -> Type:
    """Reads what `str(type)` wrote. Raises InputError."""
    match = re.fullmatch(r"(\w+)<(.*)>", text.strip())
    if match is None or match[1] not in _PARSERS:
        raise InputError(
            f"{text!r} is not a type", hint=f"types are {', '.join(_PARSERS)}, as in tokens<T x 8 x float32>"
        )
    try:
        return _PARSERS[match[1]]([part.strip() for part in match[2].split(" x ")])
    except (ValueError, IndexError, ZeroDivisionError):
        raise InputError(
            f"malformed type {text!r}", hint="see the type's docstring in moecc.ir.types"
        ) from None
