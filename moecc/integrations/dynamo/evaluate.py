"""Parts of a graph run on samples: what a block means is what it computes, however it is spelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from moecc.integrations.dynamo.graph import (
    UnmatchedError,
    is_cast,
    is_number,
    operation,
    region,
    require,
    value,
)


class Sizes:
    """Numbers for the symbols of dynamic shapes: `smallest`, and one more for each further symbol."""

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        self.symbols: dict[Any, int] = {}

    def __call__(self, size: int | torch.SymInt) -> int:
        """The number of a size, one that is open included."""
        if isinstance(size, int):
            return size
        expression: Any = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.symbols.setdefault(symbol, self.smallest + len(self.symbols))
        return int(expression.subs(self.symbols))


def evaluate(
    outputs: Sequence[fx.Node],
    inputs: Mapping[fx.Node, Tensor],
    sizes: Sizes,
    *,
    what: str,
    until: fx.Node | None = None,
    keep_dtype: bool = False,
) -> list[Tensor]:
    """The outputs, as they are at the node `until`, for these values of the inputs.

    With `keep_dtype` floats stay in the dtype that they come in.

    Nothing random outside is disturbed, and inputs are not written to. Raises UnmatchedError, about `what`, where
    the outputs need more than the inputs, or do not compute.
    """
    values: dict[fx.Node, Any] = {node: sample.clone() for node, sample in inputs.items()}
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        for node in region(outputs, inputs, until=until):
            require(is_number(node) or node.op.startswith("call_"), f"{what} reads {node.name}")
            values[node] = _compute(node, values, sizes, keep_dtype)
    return [values[node] for node in outputs]


def number(found: float | torch.SymInt | torch.SymFloat, sizes: Sizes) -> float:
    """A float is the one of this call: the graph is compiled anew for another."""
    return float(found) if isinstance(found, (float, torch.SymFloat)) else sizes(found)


def _compute(node: fx.Node, values: Mapping[fx.Node, Any], sizes: Sizes, keep_dtype: bool) -> Any:
    if is_number(node):
        return number(value(node), sizes)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if keep_dtype and is_cast(node):
        return args[0]
    target = node.target
    try:
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return cast(Any, target)(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise UnmatchedError(f"{operation(node)} does not compute on a sample: {error}") from None
