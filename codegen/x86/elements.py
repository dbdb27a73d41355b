"""`tl.map_elementwise`: a scalar function, with branches and loops of its own, for one element after the other."""

from __future__ import annotations

from moecc.codegen.x86.builder import Index
from moecc.codegen.x86.control import lower_region
from moecc.codegen.x86.evaluate import stored
from moecc.codegen.x86.tiles import Frame, Rule
from moecc.codegen.x86.tree import Op


def _map(frame: Frame, op: Op) -> None:
    """The body sees `pack` elements side by side of the first operand, then those of the next; so for its results."""
    b, pack, blocks = frame.b, op.integer("pack"), op.regions[0]
    sources = [stored(frame, operand) for operand in op.operands]
    targets = [frame.new_tile(result.type) for result in op.results]

    def some(first: Index) -> None:
        places = [
            (tile.type.llvm, b.address(tile.buffer, b.add(first, i), tile.type.llvm))
            for tile in (*sources, *targets)
            for i in range(pack)
        ]
        for argument, (lane, place) in zip(blocks[0].arguments, places, strict=False):
            frame.scalars[argument] = b.load(lane, place)
        after = b.label()
        with frame.scope():
            lower_region(
                frame, blocks, [place for _, place in places[-pack * len(targets) :]], f"br label %{after}"
            )
        b.start(after)

    b.repeat(op.result.type.size, pack, some)
    frame.tiles.update(zip(op.results, targets, strict=True))


RULES: dict[str, Rule] = {"tt.map_elementwise": _map}
