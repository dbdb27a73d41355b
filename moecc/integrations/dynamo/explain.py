"""`moecc.explain(model, *inputs)`: what `backend="moecc"` makes of every block of experts of a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from moecc.integrations.dynamo.rewrite import Finding, rewrite

COLUMNS = ("module", "form", "result", "tokens", "experts", "hidden x inner", "dtype", "activation", "layout")


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """blocks: one a block of experts, in the order of the model. breaks: why Dynamo ended a graph early, each once.

    graphs: how many there are, one where nothing breaks. str() is a table, with the reason below each block that is
    left to inductor.
    """

    blocks: tuple[Finding, ...]
    graphs: int
    breaks: tuple[str, ...]

    @property
    def fused(self) -> int:
        """How many blocks become an op of moecc."""
        return sum(block.shape is not None for block in self.blocks)

    def __str__(self) -> str:
        plural = "" if self.graphs == 1 else "s"
        head = f"{self.fused} of {len(self.blocks)} blocks fused; {self.graphs} graph{plural}"
        rows = [COLUMNS, *map(_cells, self.blocks)] if self.blocks else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        left = [f"{b.module}: left to inductor: {b.reason}" for b in self.blocks if b.reason is not None]
        breaks = [f"graph break: {reason.splitlines()[0]}" for reason in self.breaks]
        return "\n".join([head, *table, *left, *breaks])


def _cells(block: Finding) -> tuple[str, ...]:
    shape = block.shape
    if shape is None:
        return (block.module, block.form, "left", *[""] * (len(COLUMNS) - 3))
    return (
        block.module,
        block.form,
        "fused",
        shape.tokens,
        f"{shape.experts} top-{shape.top_k}",
        f"{shape.hidden} x {shape.intermediate}",
        shape.dtype,
        shape.activation,
        shape.layout,
    )


def explain(model: Callable[..., Any], *inputs: Any, **keywords: Any) -> Explanation:
    """Traces model(*inputs, **keywords), as torch.compile does, and says what is found in its graphs.

    The model runs once, in eager mode and as it is. Dynamo forgets what it had compiled in this process, as with
    torch._dynamo.explain (its limit of recompilations counts what every backend made of a function): compiled models
    are traced again at their next call, and inductor finds its part in its caches.
    """
    blocks: list[Finding] = []
    graphs = 0

    def collect(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        blocks.extend(rewrite(_copied(graph)))
        return graph.forward

    torch.compiler.reset()
    before = dict(counters["graph_break"])
    torch.compile(model, backend=collect)(*inputs, **keywords)
    breaks = [reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0)]
    torch.compiler.reset()
    return Explanation(blocks=tuple(blocks), graphs=graphs, breaks=tuple(breaks))


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """The graph apart from the module that goes on to run."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)
