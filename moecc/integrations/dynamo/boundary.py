"""What an op may take the place of: nobody outside needs what is inside, and nobody writes to what it reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moecc.integrations.dynamo.graph import region, require, storages, written


def closed_region(inputs: Sequence[fx.Node], output: fx.Node, *, hidden: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes from the inputs to the output, in the order of the graph, of which `hidden` are hidden states.

    Raises UnmatchedError where an op with these inputs would not leave everything else as it is.
    """
    inside = region([output], inputs)
    rows = _rows(hidden, inside)
    _require_private(output, rows)
    _require_unwritten(inputs, output, inside, rows)
    return inside


def erase(inside: Sequence[fx.Node]) -> None:
    """Erases what nobody reads now; values that are read elsewhere stay, and so do writes to them."""
    within = set(inside)
    kept = {node for node in inside if any(user not in within for user in node.users)}
    size = -1
    while size != len(kept):
        size, memory = len(kept), storages(kept)
        kept |= {source for node in kept for source in node.all_input_nodes if source in within}
        kept |= {n for n in inside if (target := written(n)) is not None and storages([target]) & memory}
    for node in reversed(inside):
        if node not in kept and not node.users:
            node.graph.erase_node(node)


def _rows(hidden: Sequence[fx.Node], inside: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed from hidden states, as opposed to what follows from the other inputs alone."""
    sources, rows = set(hidden), set[fx.Node]()
    for node in inside:
        if (rows | sources).intersection(node.all_input_nodes):
            rows.add(node)
    return rows


def _require_private(output: fx.Node, rows: set[fx.Node]) -> None:
    """What is computed from hidden states stays inside; what follows from the rest alone may be read by others."""
    for node in rows - {output}:
        outside = [user.name for user in node.users if user not in rows]
        require(not outside, f"{node.name}, which the op does not give, is read by {', '.join(outside)}")


def _require_unwritten(
    inputs: Sequence[fx.Node], output: fx.Node, inside: Sequence[fx.Node], rows: set[fx.Node]
) -> None:
    """The op reads its tensors where the block ends, and what was evaluated is what stands there: nobody may write to
    the former once the block has begun, nor to any other value once the rows have met it.
    """
    memory: set[int] = set()
    for node in output.graph.nodes:
        if node is output:
            return
        if node is inside[0]:
            memory |= storages(inputs)
        target = written(node)
        if target is not None:
            is_read = bool(storages([target]) & memory)
            require(not is_read, f"{target.name}, which the op reads, is written to by {node.name}")
        if node in rows:
            memory |= storages(value for value in node.all_input_nodes if value not in rows)
