"""moecc compiles Mixture-of-Experts models: where experts live, when bytes move, which kernels run."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`moecc.explain`, loaded with torch when it is first asked for."""
    if name == "explain":
        from moecc.integrations.dynamo.explain import explain

        return explain
    raise AttributeError(f"module 'moecc' has no attribute {name!r}")
