"""moecc compiles Mixture-of-Experts models: where experts live, when bytes move, which kernels run."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "compile_model": "moecc.api",
    "explain": "moecc.integrations.dynamo.explain",
    "save_trace": "moecc.frontend.trace",
    "trace": "moecc.integrations.routing_recorder",
}


def __getattr__(name: str) -> Any:
    """The functions for notebooks and scripts, each loaded when it is first asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moecc' has no attribute {name!r}")
