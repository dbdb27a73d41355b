"""A Triton backend for x86-64 that needs nothing but Triton: kernels run on CPU tensors.

It registers itself under `triton.backends` and is active where no GPU is, with TRITON_DEFAULT_BACKEND=x86, or from
`activate`.
"""

# Triton looks for backends while it is imported, and has to find the modules of this one whole: it comes first.
import triton  # noqa: F401

from moecc.codegen.x86.api import activate, activated

__all__ = ["activate", "activated"]
