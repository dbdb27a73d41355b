"""Text to IR. Every problem is an InputError that says where in the text it stands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from moecc.errors import InputError, Location
from moecc.ir.core import Function, Module, Op, Value
from moecc.ir.ops import BY_MNEMONIC
from moecc.ir.types import Type, parse_type

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
    | (?P<type>(?:tokens|tensor|weights|routing|plan)<[^<>\n]*>)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    | (?P<value>%[A-Za-z_]\w*)
    | (?P<symbol>@[\w.\-]+)
    | (?P<word>[A-Za-z_][\w.]*)
    | (?P<punctuation>[(){}\[\]=:,])""",
    re.VERBOSE,
)
_KINDS = {
    "value": "a value such as %x",
    "symbol": "a name such as @f",
    "word": "a word",
    "string": "a text in quotes",
    "number": "a number",
    "type": "a type such as tokens<T x 8 x float32>",
    "end": "the end",
}
_WORDS = {"true": True, "false": False, "null": None}
_MAX_DEPTH = 64
T = TypeVar("T")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: Location


def parse_module(text: str, file: str = "<text>") -> Module:
    """Reads what `print_module` wrote. Raises InputError with the location in `file`."""
    return _Parser(list(_tokenize(text, file)), file).module()


def _tokenize(text: str, file: str) -> Iterator[_Token]:
    position, line, line_start = 0, 1, 0
    while position < len(text):
        at = Location(file, line, position - line_start + 1)
        match = _TOKEN.match(text, position)
        if match is None:
            raise InputError(
                f"unexpected character {text[position]!r}", where=at, hint="see docs/ir.md for the text form"
            )
        if match.lastgroup != "skip":
            yield _Token(str(match.lastgroup), match[0], at)
        line += match[0].count("\n")
        if "\n" in match[0]:
            line_start = match.start() + match[0].rindex("\n") + 1
        position = match.end()
    yield _Token("end", "end of text", Location(file, line, position - line_start + 1))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


class _Parser:
    def __init__(self, tokens: list[_Token], file: str) -> None:
        self.tokens, self.file, self.position = tokens, file, 0
        self.values: dict[str, Value] = {}

    @property
    def next(self) -> _Token:
        return self.tokens[self.position]

    def peek(self, ahead: int) -> _Token:
        return self.tokens[min(self.position + ahead, len(self.tokens) - 1)]

    def take(self, *expected: str) -> _Token:
        """The next token, which must be of a kind or a text in `expected`."""
        token = self.next
        if token.kind not in expected and token.text not in expected:
            wanted = " or ".join(_KINDS.get(e, repr(e)) for e in expected)
            raise InputError(
                f"expected {wanted}, found {token.text!r}", where=token.at, hint="see docs/ir.md"
            )
        self.position += 1
        return token

    def accept(self, text: str) -> bool:
        found = self.next.text == text and self.next.kind != "string"
        self.position += found
        return found

    def listed(self, close: str, item: Callable[[], T]) -> list[T]:
        """Items between commas up to and with `close`."""
        items: list[T] = []
        while not self.accept(close):
            if items:
                self.take(",")
            items.append(item())
        return items

    def named(self, close: str, item: Callable[[], tuple[str, T]]) -> dict[str, T]:
        """Items by name up to and with `close`; a name that comes twice is an error."""
        found: dict[str, T] = {}

        def add() -> None:
            at = self.next.at
            name, value = item()
            if name in found:
                raise InputError(f"{name!r} is given twice", where=at, hint="remove one of them")
            found[name] = value

        self.listed(close, add)
        return found

    def module(self) -> Module:
        self.take("module")
        name = self.take("symbol").text[1:]
        attributes = self.module_attributes()
        module = Module(name, [], attributes)
        while not self.accept("}"):
            at = self.next.at
            function = self.function()
            if function.name in {f.name for f in module.functions}:
                raise InputError(
                    f"function @{function.name} stands twice", where=at, hint="rename one of them"
                )
            module.functions.append(function)
        self.take("end")
        return module

    def module_attributes(self) -> dict[str, Any]:
        """`{attributes} {` or just `{`: a body starts with `func` or is empty."""
        self.take("{")
        if self.next.text in ("func", "}"):
            return {}
        attributes = self.named("}", self.pair)
        self.take("{")
        return attributes

    def function(self) -> Function:
        at = self.take("func").at
        name = self.take("symbol").text[1:]
        self.values = {}
        self.take("(")
        arguments = self.listed(")", self.argument)
        attributes: dict[str, Any] = {}
        if self.next.text == "{" and self.peek(1).kind in ("word", "string") and self.peek(2).text == "=":
            self.take("{")
            attributes = self.named("}", self.pair)
        location = self.location() or at
        self.take("{")
        function = Function(name, arguments, attributes=attributes, location=location)
        while not self.accept("return"):
            function.ops.append(self.op())
        function.returns = [self.operand()]
        while self.accept(","):
            function.returns.append(self.operand())
        self.take("}")
        return function

    def argument(self) -> Value:
        token = self.take("value")
        self.take(":")
        value = Value(token.text[1:], self.type())
        self.define(token, value)
        return value

    def op(self) -> Op:
        names = []
        if self.next.kind == "value":
            names.append(self.take("value"))
            while self.accept(","):
                names.append(self.take("value"))
            self.take("=")
        word = self.take("word")
        kind = BY_MNEMONIC.get(word.text)
        if kind is None:
            known = ", ".join(BY_MNEMONIC)
            raise InputError(
                f"unknown operation {word.text!r}", where=word.at, hint=f"operations are {known}"
            )
        self.take("(")
        operands = self.named(")", self.named_operands)
        attributes = self.named("}", self.pair) if self.accept("{") else {}
        types = self.types() if self.accept(":") else []
        location = self.location() or word.at
        try:
            op = kind(operands, attributes, names=[n.text[1:] for n in names], location=word.at)
        except InputError as error:
            raise InputError(error.message, where=word.at, hint=error.hint) from None
        op.location = location
        self.check_results(op, names, types, word)
        return op

    def check_results(self, op: Op, names: list[_Token], types: list[Type], word: _Token) -> None:
        inferred = [value.type for value in op.all_results]
        if len(names) != len(inferred):
            message = f"{op.mnemonic}: has {len(inferred)} results, not {len(names)}"
            raise InputError(message, where=word.at, hint="name every result on the left of '='")
        if types != inferred:
            expected, found = ", ".join(map(str, inferred)), ", ".join(map(str, types))
            message = f"{op.mnemonic}: result types are {expected}, not {found}"
            raise InputError(message, where=word.at, hint="types follow from operands and attributes")
        for token, value in zip(names, op.all_results, strict=True):
            self.define(token, value)

    def define(self, token: _Token, value: Value) -> None:
        if token.text in self.values:
            raise InputError(
                f"{token.text} is defined twice", where=token.at, hint="give one of them another name"
            )
        self.values[token.text] = value

    def operand(self) -> Value:
        token = self.take("value")
        if token.text not in self.values:
            hint = "define it on an earlier line or as an argument"
            raise InputError(f"{token.text} is not defined", where=token.at, hint=hint)
        return self.values[token.text]

    def named_operands(self) -> tuple[str, list[Value]]:
        name = self.take("word").text
        self.take("=")
        return name, self.listed("]", self.operand) if self.accept("[") else [self.operand()]

    def types(self) -> list[Type]:
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        return types

    def type(self) -> Type:
        token = self.take("type")
        try:
            return parse_type(token.text)
        except InputError as error:
            raise InputError(error.message, where=token.at, hint=error.hint) from None

    def location(self) -> Location | None:
        if not self.accept("loc"):
            return None
        self.take("(")
        file = self.literal(self.take("string"))
        self.take(":")
        line = self.literal(self.take("number"))
        self.take(":")
        column = self.literal(self.take("number"))
        self.take(")")
        return Location(file, line, column)

    def pair(self) -> tuple[str, Any]:
        token = self.take("word", "string")
        self.take("=")
        return (self.literal(token) if token.kind == "string" else token.text), self.attribute()

    def literal(self, token: _Token) -> Any:
        try:
            return json.loads(token.text, parse_float=_finite)
        except ValueError:
            message = f"malformed {token.kind} {token.text[:40]}"
            raise InputError(message, where=token.at, hint="write it as in JSON") from None

    def attribute(self, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise InputError(
                "attributes nest too deep", where=self.next.at, hint=f"at most {_MAX_DEPTH} levels"
            )
        if self.accept("["):
            return self.listed("]", lambda: self.attribute(depth + 1))
        if self.accept("{"):
            return self.named("}", self.pair)
        token = self.take("number", "string", *_WORDS)
        return _WORDS[token.text] if token.kind == "word" else self.literal(token)
