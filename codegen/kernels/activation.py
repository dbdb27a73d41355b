# mypy: ignore-errors
"""The activations of `Activation` in fp32, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp_gate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """Gate and up as the activation sees them. A GPU's plain minimum would turn a NaN into the limit."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
    return gate, up


@triton.jit
def squash(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """(function(gate), its derivative); whichever is not used costs nothing once compiled."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        return gate * share, share + gate * density
    elif ACTIVATION == "relu" or ACTIVATION == "relu2":
        positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu2":
            return positive * positive, 2.0 * positive
        else:
            return positive, tl.where(gate > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z), with 2 z = 2 sqrt(2 / pi) * (gate + 0.044715 gate^3).
        share = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
        steepness = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        return gate * share, share + gate * share * (1.0 - share) * steepness
    elif ACTIVATION == "identity":
        return gate, tl.full(gate.shape, 1.0, tl.float32)
    else:
        tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "clamped_swiglu")
        if ACTIVATION == "silu":
            share = tl.sigmoid(gate)
            return gate * share, share * (1.0 + gate * (1.0 - share))
        else:
            share = tl.sigmoid(ALPHA * gate)
            return gate * share, share * (1.0 + ALPHA * gate * (1.0 - share))


@triton.jit
def activate(
    gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
):
    """h of the two halves of the first GEMM; without a gate `gate` is all there is."""
    gate, up = clamp_gate(gate, up, ACTIVATION, LIMIT)
    h, _ = squash(gate, ACTIVATION, ALPHA)
    if GATED:
        h *= up
    return h
