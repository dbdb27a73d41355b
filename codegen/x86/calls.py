"""Functions: the kernel itself and what it calls without inlining."""

from __future__ import annotations

from moecc.codegen.x86.builder import V
from moecc.codegen.x86.control import lower_region
from moecc.codegen.x86.evaluate import stored
from moecc.codegen.x86.tiles import Frame, Rule, Stored
from moecc.codegen.x86.tree import Op

PROGRAM = [V(f"%pid{axis}", "i32") for axis in range(3)] + [V(f"%programs{axis}", "i32") for axis in range(3)]
ARENA, RUNTIME = V("%arena", "ptr"), V("%runtime", "ptr")


def lower_function(frame: Frame, op: Op) -> None:
    """As an internal function: tiles by address, results through addresses, then what every program knows."""
    blocks = op.regions[0]
    parameters: list[V] = []
    for number, value in enumerate(blocks[0].arguments):
        parameter = V(f"%a{number}", "ptr" if value.type.is_tensor else value.type.llvm)
        parameters.append(parameter)
        if value.type.is_tensor:
            frame.tiles[value] = Stored(parameter, value.type)
        else:
            frame.scalars[value] = parameter
    (count,) = {len(block.terminator.operands) for block in blocks if block.terminator.name == "tt.return"}
    results = [V(f"%r{number}", "ptr") for number in range(count)]
    lower_region(frame, blocks, results)
    name = str(op.attributes["sym_name"])
    listed = ", ".join(v.typed for v in [*parameters, *results, *PROGRAM])
    header = f"define internal void @{name}.program({listed}, ptr noalias %arena, ptr %runtime) #0"
    frame.b.module.functions[name] = frame.b.function(header)


def _call(frame: Frame, op: Op) -> None:
    b = frame.b
    arguments = [
        stored(frame, value).buffer if value.type.is_tensor else frame.scalars[value] for value in op.operands
    ]
    places = []
    for result in op.results:
        if result.type.is_tensor:
            tile = frame.new_tile(result.type)
            frame.tiles[result] = tile
            places.append(tile.buffer)
        else:
            places.append(frame.allocate(result.type.llvm, 1))
    name = str(op.attributes["callee"]).lstrip("@").strip('"')
    b.call(f"{name}.program", "void", *arguments, *places, *PROGRAM, ARENA, RUNTIME, declare=False)
    for result, place in zip(op.results, places, strict=True):
        if not result.type.is_tensor:
            frame.scalars[result] = b.load(result.type.llvm, place)


RULES: dict[str, Rule] = {"tt.call": _call}
