"""TTIR in generic form -> LLVM IR of a function that runs a range of a kernel's programs."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.codegen.x86 import calls, collective, control, dots, function, memory, shapes
from moecc.codegen.x86.builder import Builder, Module, V
from moecc.codegen.x86.calls import lower_function
from moecc.codegen.x86.elementwise import ELEMENTWISE
from moecc.codegen.x86.exchange import rewrite_exchanges
from moecc.codegen.x86.features import Level
from moecc.codegen.x86.plan import make_plan
from moecc.codegen.x86.tiles import Arena, Frame, InlineRule, Rule
from moecc.codegen.x86.tree import Op, parse_module

INLINE: dict[str, InlineRule] = {**shapes.INLINE, **memory.INLINE, **collective.INLINE}
RULES: dict[str, Rule] = {
    **function.RULES,
    **memory.RULES,
    **control.RULES,
    **dots.RULES,
    **collective.RULES,
    **calls.RULES,
}
COSTLY = {
    "tt.load",
    *collective.COSTLY,
    *(name for name, rule in ELEMENTWISE.items() if rule.costly),
}

ENTRY_SIGNATURE = ("!llvm.ptr", "i64", "i64", "i32", "i32", "i32", "!llvm.ptr")
"""Of the entry: slots of arguments, first and last program, the grid, this thread's `struct runtime`."""


@dataclass(frozen=True)
class Lowered:
    """`arena_bytes`: what each thread needs for large tiles. `spins`: programs wait for each other."""

    name: str
    llvm_ir: str
    arena_bytes: int
    spins: bool


def lower_kernel(text: str, level: Level, *, fuse: bool = True) -> Lowered:
    """`fuse`: a product may be added to something without being rounded first.

    UnsupportedError, located in the kernel's source, for what cannot be compiled.
    """
    module_op = parse_module(text)
    functions = {str(op.attributes["sym_name"]): op for op in module_op.body().ops}
    (kernel,) = (op for op in functions.values() if op.attributes.get("sym_visibility") == "public")
    module, arena = Module(avx512=level.vector_bytes == 64, fuse=fuse), Arena()
    for op in functions.values():
        rewrite_exchanges(op, level.lanes)
        plan = make_plan(op, INLINE, COSTLY)
        own_arena = arena if op is kernel else None
        lower_function(Frame(Builder(module), level, plan, INLINE, RULES, own_arena), op)
    name = str(kernel.attributes["sym_name"])
    module.functions[f"{name}.entry"] = _entry(module, name, kernel)
    attributes = (
        f'attributes #0 = {{ nounwind "target-cpu"="{level.cpu}" "target-features"="{level.llvm}" '
        f'"prefer-vector-width"="{8 * level.vector_bytes}" "min-legal-vector-width"="{8 * level.vector_bytes}" '
        '"no-trapping-math"="true" }\n'
    )
    return Lowered(name, module.text() + attributes, arena.bytes, any(map(_spins, module_op.walk())))


def _spins(op: Op) -> bool:
    """A loop until something that memory says: another program may have to say it.

    Not so for a lock: who holds it is running, and gives it back.
    """
    if op.name != "scf.while":
        return False
    return any(
        (inner.name.startswith("tt.atomic") and not _takes_lock(inner))
        or inner.attributes.get("isVolatile") is True
        for inner in op.walk()
    )


def _takes_lock(op: Op) -> bool:
    """Zero becomes another constant."""
    if op.name != "tt.atomic_cas":
        return False
    free, held = (value.op.attributes.get("value") if value.op else None for value in op.operands[1:3])
    return free == 0 and isinstance(held, int) and held != 0


def _entry(module: Module, name: str, kernel: Op) -> str:
    """Programs first to last - 1 in the order of the grid, axis 0 fastest."""
    b = Builder(module)
    arguments = [
        b.load(value.type.llvm, b.address(V("%args", "ptr"), i, "i64"), 1)
        for i, value in enumerate(kernel.regions[0][0].arguments)
    ]
    arena = b.load("ptr", V("%runtime", "ptr"))
    tiles = "tilecfg" in module.globals
    if tiles:
        b.call("llvm.x86.ldtilecfg", "void", V("@tilecfg", "ptr"))
    grid = [V(f"%g{axis}", "i32") for axis in range(3)]
    plane = b.op("mul", b.cast("zext", grid[0], "i64"), b.cast("zext", grid[1], "i64"))

    def program(number: V, _: list[V]) -> tuple[()]:
        within = b.op("urem", number, plane)
        row = b.cast("zext", grid[0], "i64")
        ids = [b.op("urem", within, row), b.op("udiv", within, row), b.op("udiv", number, plane)]
        narrow = [b.cast("trunc", id_, "i32") for id_ in ids]
        b.call(
            f"{name}.program", "void", *arguments, *narrow, *grid, arena, V("%runtime", "ptr"), declare=False
        )
        return ()

    b.loop(V("%first", "i64"), V("%last", "i64"), 1, program)
    if tiles:
        b.call("llvm.x86.tilerelease", "void")
    b.run("ret void")
    return b.function(
        f"define void @{name}(ptr %args, i64 %first, i64 %last, i32 %g0, i32 %g1, i32 %g2, ptr %runtime) #0"
    )
