"""LLVM IR as text: typed SSA values, folded index arithmetic, structured loops and branches."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moecc.codegen.x86.types import BYTES, memory_type


class V(NamedTuple):
    """An SSA value or constant and its LLVM type."""

    name: str
    type: str

    def __str__(self) -> str:
        return self.name

    @property
    def typed(self) -> str:
        return f"{self.type} {self.name}"

    @property
    def lanes(self) -> int:
        """0 for a scalar."""
        return int(self.type[1 : self.type.index(" ")]) if self.type[0] == "<" else 0

    @property
    def lane_type(self) -> str:
        return self.type[self.type.index("x") + 2 : -1] if self.type[0] == "<" else self.type


Index = int | V
"""An i64: a Python integer where it is known."""


def vector(lanes: int, lane_type: str) -> str:
    """LLVM's type of that many lanes; 0 lanes are a scalar."""
    return f"<{lanes} x {lane_type}>" if lanes else lane_type


def like(value: V, lane_type: str) -> str:
    """The type of value's lanes turned into lane_type."""
    return vector(value.lanes, lane_type)


def constant(number: float | int | bool, lane_type: str, lanes: int = 0) -> V:
    """A constant, in every lane; floats are rounded to the type, to nearest even."""
    text = _float_text(float(number), lane_type) if lane_type in _FLOATS else str(int(number))
    if not lanes:
        return V(text, lane_type)
    return V(f"splat ({lane_type} {text})", vector(lanes, lane_type))


def constants(numbers: Sequence[float | int], lane_type: str) -> V:
    """A vector of these constants."""
    items = ", ".join(constant(number, lane_type).typed for number in numbers)
    return V(f"<{items}>", vector(len(numbers), lane_type))


_FLOATS = ("float", "double", "half")
_SUFFIX = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}


def _float_text(number: float, lane_type: str) -> str:
    if lane_type == "half":
        try:
            return f"0xH{struct.unpack('<H', struct.pack('<e', number))[0]:04X}"
        except OverflowError:
            return "0xH7C00" if number > 0 else "0xHFC00"
    if lane_type == "double":
        return f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
    (single,) = struct.unpack("<f", struct.pack("<I", _single_bits(number)))
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"


def _single_bits(number: float) -> int:
    try:
        packed = struct.pack("<f", number)
    except OverflowError:
        packed = struct.pack("<f", math.copysign(math.inf, number))
    return int(struct.unpack("<I", packed)[0])


def nearest_bfloat(number: float) -> int:
    """Rounded to nearest even."""
    bits = _single_bits(number)
    return (bits if math.isnan(number) else bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def suffix(type_: str) -> str:
    """How the name of an overloaded intrinsic spells a type: `v16f32`."""
    value = V("", type_)
    lane = _SUFFIX.get(value.lane_type, value.lane_type)
    return f"v{value.lanes}{lane}" if value.lanes else lane


BRANCH_WEIGHTS = """!1 = !{!"branch_weights", i32 2000, i32 1}
!2 = !{!"branch_weights", i32 1, i32 2000}
"""


@dataclass
class Module:
    """What the functions of one kernel share; `avx512` says that its instructions may be named, `fuse` that a
    product may be added without being rounded first."""

    avx512: bool = False
    fuse: bool = True
    declarations: set[str] = field(default_factory=set)
    globals: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        return "\n".join(
            [*self.globals.values(), *sorted(self.declarations), *self.functions.values(), BRANCH_WEIGHTS]
        )


class Builder:
    """The body of one function; `entry` holds its allocas."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.lines: list[str] = []
        self.entry: list[str] = []
        self.current = "entry"
        self._count = 0

    def fresh(self) -> str:
        self._count += 1
        return f"%t{self._count}"

    def run(self, line: str) -> None:
        self.lines.append("  " + line)

    def emit(self, text: str, type_: str) -> V:
        name = self.fresh()
        self.lines.append(f"  {name} = {text}")
        return V(name, type_)

    def label(self) -> str:
        self._count += 1
        return f"b{self._count}"

    def start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.current = label

    def branch(self, label: str) -> None:
        self.run(f"br label %{label}")

    def function(self, header: str) -> str:
        """The text of the function; `header` is all before the opening brace."""
        return "\n".join([f"{header} {{", "entry:", *self.entry, *self.lines, "}", ""])

    # --- values of any number of lanes

    def op(self, name: str, a: V, b: V) -> V:
        """`name` may hold flags: `add nsw`."""
        return self.emit(f"{name} {a.typed}, {b}", a.type)

    def cast(self, name: str, value: V, lane_type: str) -> V:
        target = like(value, lane_type)
        return value if target == value.type else self.emit(f"{name} {value.typed} to {target}", target)

    def compare(self, name: str, a: V, b: V) -> V:
        """`name`: `icmp slt`, `fcmp oeq`."""
        return self.emit(f"{name} {a.typed}, {b}", like(a, "i1"))

    def select(self, condition: V, a: V, b: V) -> V:
        return self.emit(f"select {condition.typed}, {a.typed}, {b.typed}", a.type)

    def intrinsic(self, name: str, result: str, *arguments: V, overloads: Sequence[str] | None = None) -> V:
        """Call of `llvm.…`; `overloads` are the types in its mangled name, by default the first argument's."""
        mangled = ".".join([name, *map(suffix, [arguments[0].type] if overloads is None else overloads)])
        return self.call(mangled, result, *arguments)

    def call(self, name: str, result: str, *arguments: V, declare: bool = True) -> V:
        """`declare` is False for a function of this module; a result `void` has no use."""
        if declare:
            types = ", ".join(argument.type for argument in arguments)
            self.module.declarations.add(f"declare {result} @{name}({types})")
        text = f"call {result} @{name}({', '.join(argument.typed for argument in arguments)})"
        if result == "void":
            self.run(text)
            return V("", "void")
        return self.emit(text, result)

    def splat(self, value: V, lanes: int) -> V:
        if not lanes:
            return value
        target = vector(lanes, value.type)
        if not value.name.startswith("%"):
            return V(f"splat ({value.typed})", target) if value.name != "poison" else V("poison", target)
        first = self.emit(f"insertelement {target} poison, {value.typed}, i32 0", target)
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, a: V, b: V, lanes: Sequence[int]) -> V:
        """Lanes of a, then of b, by number; -1 is any."""
        picks = ", ".join(f"i32 {'poison' if lane < 0 else lane}" for lane in lanes)
        return self.emit(
            f"shufflevector {a.typed}, {b.typed}, <{len(lanes)} x i32> <{picks}>",
            vector(len(lanes), a.lane_type),
        )

    def extract(self, value: V, lane: int) -> V:
        return self.emit(f"extractelement {value.typed}, i32 {lane}", value.lane_type)

    def insert(self, value: V, item: V, lane: int) -> V:
        return self.emit(f"insertelement {value.typed}, {item.typed}, i32 {lane}", value.type)

    # --- memory

    def allocate(self, lane_type: str, count: int, align: int = 64) -> V:
        """Memory of this call of the function, from its entry."""
        name = self.fresh()
        self.entry.append(f"  {name} = alloca [{count} x {memory_type(lane_type)}], align {align}")
        return V(name, "ptr")

    def address(self, pointer: V, index: Index, lane_type: str) -> V:
        """pointer + index elements."""
        if isinstance(index, int) and index == 0:
            return pointer
        return self.emit(
            f"getelementptr {memory_type(lane_type)}, {pointer.typed}, {_i64(index).typed}", "ptr"
        )

    def load(self, type_: str, pointer: V, align: int = 0) -> V:
        """Truth values are read from bytes. Align in bytes, by default that of one lane."""
        lane = V("", type_).lane_type
        if lane == "i1":
            return self.cast("trunc", self.load(like(V("", type_), "i8"), pointer, align), "i1")
        return self.emit(f"load {type_}, {pointer.typed}, align {align or BYTES[lane]}", type_)

    def store(self, value: V, pointer: V, align: int = 0) -> None:
        if value.lane_type == "i1":
            value = self.cast("zext", value, "i8")
        self.run(f"store {value.typed}, {pointer.typed}, align {align or BYTES[value.lane_type]}")

    # --- indices, i64

    def add(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.op("add nsw", _i64(a), _i64(b))

    def multiply(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self.op("mul nsw", _i64(a), _i64(b))

    def divide(self, a: Index, b: int) -> Index:
        """Of an index that is not negative."""
        if isinstance(a, int):
            return a // b
        return a if b == 1 else self.op("udiv", a, V(str(b), "i64"))

    def remainder(self, a: Index, b: int) -> Index:
        if isinstance(a, int):
            return a % b
        return 0 if b == 1 else self.op("urem", a, V(str(b), "i64"))

    def dot_index(self, indices: Sequence[Index], strides: Sequence[int]) -> Index:
        total: Index = 0
        for index, stride in zip(indices, strides, strict=True):
            total = self.add(total, self.multiply(index, stride))
        return total

    # --- control

    def loop(
        self,
        low: Index | V,
        high: Index | V,
        step: Index | V,
        body: Callable[[V, list[V]], Sequence[V]],
        carried: Sequence[V] = (),
        *,
        type_: str = "i64",
        unsigned: bool = False,
    ) -> list[V]:
        """`for iv in range(low, high, step)`, step positive; body returns the next carried values."""
        lo, hi, by = (x if isinstance(x, V) else V(str(x), type_) for x in (low, high, step))
        before, head, inside, after = self.current, self.label(), self.label(), self.label()
        self.branch(head)
        self.start(head)
        iv = V(self.fresh(), type_)
        values = [V(self.fresh(), value.type) for value in carried]
        place = len(self.lines)
        condition = self.compare("icmp ult" if unsigned else "icmp slt", iv, hi)
        self.run(f"br {condition.typed}, label %{inside}, label %{after}")
        self.start(inside)
        following = list(body(iv, values))
        stepped = self.op("add", iv, by)
        end = self.current
        self.branch(head)
        phis = [
            f"  {here} = phi {here.type} [ {first}, %{before} ], [ {following_}, %{end} ]"
            for here, first, following_ in zip(
                [iv, *values], [lo, *carried], [stepped, *following], strict=True
            )
        ]
        self.lines[place:place] = phis
        self.start(after)
        return values

    def repeat(self, count: int, step: int, body: Callable[[Index], None]) -> None:
        """body(0), body(step), … below count; no loop for a single one."""
        if count <= step:
            body(0)
            return

        def once(iv: V, _: list[V]) -> Sequence[V]:
            body(iv)
            return ()

        self.loop(0, count, step, once)

    def choose(
        self,
        condition: V,
        then: Callable[[], Sequence[V] | None],
        otherwise: Callable[[], Sequence[V] | None] = lambda: None,
        *,
        likely: bool | None = None,
    ) -> list[V]:
        """The values of the branch taken; both return as many, of the same types, None for none."""
        yes, no, after = self.label(), self.label(), self.label()
        weights = "" if likely is None else f", !prof !{1 if likely else 2}"
        self.run(f"br {condition.typed}, label %{yes}, label %{no}{weights}")
        ends: list[tuple[str, list[V]]] = []
        for label, body in ((yes, then), (no, otherwise)):
            self.start(label)
            values = list(body() or ())
            ends.append((self.current, values))
            self.branch(after)
        self.start(after)
        (then_end, then_values), (else_end, else_values) = ends
        return [
            self.emit(f"phi {a.type} [ {a}, %{then_end} ], [ {b}, %{else_end} ]", a.type)
            for a, b in zip(then_values, else_values, strict=True)
        ]


def _i64(index: Index) -> V:
    return index if isinstance(index, V) else V(str(index), "i64")
