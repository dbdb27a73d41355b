"""MLIR's generic form as a tree of ops and values.

The generic form spells every op alike, `%r = "name"(%a) <{attributes}> ({regions}) : (types) -> types loc(…)`, so that
no op needs a grammar of its own, and it has not changed between the Triton versions that are supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moecc.codegen.x86.types import Type, parse_type

Attribute = int | bool | str | tuple[int, ...]


@dataclass(eq=False)
class Value:
    """An SSA value; `op` is None for the argument of a block, `users` has an entry for every use."""

    name: str
    type: Type
    op: Op | None = None
    users: list[Op] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(eq=False)
class Block:
    arguments: list[Value]
    ops: list[Op]
    owner: Op
    label: str = ""

    @property
    def terminator(self) -> Op:
        return self.ops[-1]


@dataclass(eq=False)
class Op:
    """One operation; `location` is `file:line:column` of the kernel's source, where it is known."""

    name: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Attribute]
    regions: list[list[Block]]
    location: str
    block: Block | None = None
    successors: tuple[str, ...] = ()

    @property
    def result(self) -> Value:
        return self.results[0]

    def body(self, index: int = 0) -> Block:
        """The one block of a region."""
        (block,) = self.regions[index]
        return block

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.attributes.get(name, default)
        assert isinstance(value, int), f"{self.name}: {name} is {value!r}"
        return value

    def text(self, name: str, default: str = "") -> str:
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.attributes.get(name, ())
        assert isinstance(value, tuple), f"{self.name}: {name} is {value!r}"
        return value

    def walk(self) -> Iterator[Op]:
        """This op and all in its regions, in the order of the text."""
        yield self
        for region in self.regions:
            for block in region:
                for op in block.ops:
                    yield from op.walk()

    def __repr__(self) -> str:
        return (
            f"{', '.join(map(str, self.results))} = {self.name}({', '.join(v.name for v in self.operands)})"
        )


def parse_module(text: str) -> Op:
    """The module op of a text in generic form; ValueError with the place for a text that is not."""
    locations = _locations(text)
    parser = _Parser(text, locations)
    parser.skip_aliases()
    return parser.op()


_SPACE = re.compile(r"(?:\s|//[^\n]*)*")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_NAME = re.compile(r'[\w.$-]+|"[^"]*"')
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_TYPE = re.compile(r"[^\s,()<>{}=]*(?:<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>)?")
_ALIAS_LINE = re.compile(r"\s*#[^\n]*\n")
_LOCATION_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_FILE = re.compile(r'"((?:[^"\\]|\\.)*)":(\d+):(\d+)')
_REFERENCE = re.compile(r"#loc\d*")


def _locations(text: str) -> dict[str, str]:
    """Alias -> `file:line:column`. Of a call the caller's place is told: it is in the user's kernel."""
    bodies = {match[1]: match[2] for match in _LOCATION_ALIAS.finditer(text)}
    return {alias: _resolve(body, bodies) for alias, body in bodies.items()}


def _resolve(body: str, bodies: dict[str, str]) -> str:
    for _ in range(len(bodies) + 1):
        caller = body.rpartition(" at ")[2]
        file = _FILE.search(caller)
        if file:
            return f"{file[1]}:{file[2]}:{file[3]}"
        reference = _REFERENCE.search(caller)
        if reference is None:
            return ""
        body = bodies.get(reference[0], "")
    return ""


class _Parser:
    def __init__(self, text: str, locations: dict[str, str]) -> None:
        self.text, self.at, self.locations = text, 0, locations
        self.values: dict[str, Value] = {}

    def skip_aliases(self) -> None:
        while match := _ALIAS_LINE.match(self.text, self.at):
            self.at = match.end()

    def sees(self, token: str) -> bool:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text.startswith(token, self.at)

    def eats(self, token: str) -> bool:
        seen = self.sees(token)
        self.at += len(token) * seen
        return seen

    def need(self, token: str) -> None:
        if not self.eats(token):
            raise ValueError(f"expected {token!r} at {self.text[self.at : self.at + 60]!r}")

    def match(self, pattern: re.Pattern[str]) -> str:
        self.sees("")
        match = pattern.match(self.text, self.at)
        if match is None:
            raise ValueError(f"expected {pattern.pattern} at {self.text[self.at : self.at + 60]!r}")
        self.at = match.end()
        return match[0]

    def op(self) -> Op:
        names = self._result_names()
        name = self.match(_STRING)[1:-1]
        self.need("(")
        operands = self._operands(")")
        successors = self._successors()
        attributes = self._attributes("}>") if self.eats("<{") else {}
        op = Op(name, operands, [], attributes, [], "", successors=successors)
        if self.eats("("):
            while not self.eats(")"):
                op.regions.append(self._region(op))
                self.eats(",")
        if self.eats("{"):
            op.attributes.update(self._attributes("}"))
        self.need(":")
        self._types()
        self.need("->")
        op.results = [Value(result, type_, op) for result, type_ in zip(names, self._types(), strict=True)]
        op.location = self._location()
        self.values.update((value.name, value) for value in op.results)
        for operand in operands:
            operand.users.append(op)
        return op

    def _result_names(self) -> list[str]:
        names: list[str] = []
        while self.sees("%"):
            name = self.match(_VALUE)
            if self.eats(":"):
                count = int(self.match(re.compile(r"\d+")))
                names += [f"{name}#{i}" for i in range(count)]
            else:
                names.append(name)
            if not self.eats(","):
                break
        if names:
            self.need("=")
        return names

    def _operands(self, close: str) -> list[Value]:
        operands = []
        while not self.eats(close):
            name = self.match(_VALUE)
            operands.append(self.values[name] if name in self.values else self.values[name + "#0"])
            self.eats(",")
        return operands

    def _successors(self) -> tuple[str, ...]:
        labels = []
        if self.eats("["):
            while not self.eats("]"):
                self.need("^")
                labels.append(self.match(_NAME))
                self.eats(",")
        return tuple(labels)

    def _attributes(self, close: str) -> dict[str, Attribute]:
        found: dict[str, Attribute] = {}
        while not self.eats(close):
            name = self.match(_NAME).strip('"')
            found[name] = _attribute(self._balanced()) if self.eats("=") else True
            self.eats(",")
        return found

    def _balanced(self) -> str:
        """Text up to the comma or closing bracket that ends an attribute."""
        self.sees("")
        start, depth, text = self.at, 0, self.text
        while True:
            char = text[self.at]
            if char == '"':
                match = _STRING.match(text, self.at)
                assert match is not None
                self.at = match.end()
                continue
            if depth == 0 and char in ",}":
                return text[start : self.at].strip()
            if char == "-" and text[self.at + 1] == ">":
                self.at += 1
            elif char in "([{<":
                depth += 1
            elif char in ")]}>":
                depth -= 1
            self.at += 1

    def _types(self) -> list[Type]:
        if not self.eats("("):
            return [parse_type(self.match(_TYPE))]
        types = []
        while not self.eats(")"):
            types.append(parse_type(self.match(_TYPE)))
            self.eats(",")
        return types

    def _location(self) -> str:
        if not self.eats("loc("):
            return ""
        start, depth = self.at, 1
        while depth:
            char = self.text[self.at]
            if char == '"':
                match = _STRING.match(self.text, self.at)
                assert match is not None
                self.at = match.end()
                continue
            depth += (char == "(") - (char == ")")
            self.at += 1
        body = self.text[start : self.at - 1]
        return self.locations.get(body) or _resolve(body, {})

    def _region(self, owner: Op) -> list[Block]:
        self.need("{")
        blocks: list[Block] = []
        if not self.sees("^") and not self.sees("}"):
            blocks.append(self._ops(Block([], [], owner)))
        while self.eats("^"):
            block = Block([], [], owner, self.match(_NAME))
            if self.eats("("):
                while not self.eats(")"):
                    name = self.match(_VALUE)
                    self.need(":")
                    value = Value(name, parse_type(self.match(_TYPE)))
                    self._location()
                    self.values[name] = value
                    block.arguments.append(value)
                    self.eats(",")
            self.need(":")
            blocks.append(self._ops(block))
        self.need("}")
        return blocks

    def _ops(self, block: Block) -> Block:
        while not (self.sees("}") or self.sees("^")):
            op = self.op()
            op.block = block
            block.ops.append(op)
        return block


_INTEGER = re.compile(r"(-?\d+)(?: : \w+)?$")
_ARRAY = re.compile(r"array<i\d+(?:: (.*))?>$")


def _attribute(text: str) -> Attribute:
    """Integers, booleans, strings and integer arrays as Python has them; anything else stays text."""
    if integer := _INTEGER.match(text):
        return int(integer[1])
    if text in ("true", "false"):
        return text == "true"
    if array := _ARRAY.match(text):
        return tuple(int(item) for item in (array[1] or "").split(",") if item.strip())
    if text.startswith('"'):
        return text[1:-1]
    return text
