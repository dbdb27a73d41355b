"""`torch.compile(model, backend="moecc")`: inductor, with the experts of untouched models on moecc's kernels.

The blocks are rewritten in Dynamo's graph, before AOTAutograd. There the forward of a training step is whole (behind
AOTAutograd the backward graph reads its values too, and would have to be matched as well), and the op brings its own
gradients: one rewrite serves inference and training. Inductor's caches keep working: their keys are made of the
rewritten graph, and this module, which whoever names the backend imports, registers the op that a cached graph calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from torch import fx

from moecc.integrations.dynamo.rewrite import rewrite

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def compile_graph(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner: Compiler | None = None,
) -> Callable[..., Any]:
    """The backend: compiles a graph of Dynamo's for these fake inputs.

    mode, options: as torch.compile gives them to inductor. inner: what compiles the rewritten graph, inductor unless
    given.
    """
    for finding in rewrite(graph):
        if finding.reason is not None:
            _say_once(finding.form, finding.reason)
    if inner is not None:
        return inner(graph, inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    compiled: Any = compile_fx(graph, inputs, config_patches=patches or None)
    return cast(Callable[..., Any], compiled)


@cache
def _say_once(form: str, reason: str) -> None:
    warnings.warn(f"moecc: a block of experts ({form}) is left to inductor: {reason}", stacklevel=3)
