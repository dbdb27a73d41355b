"""An MoE layer as one op of torch, from its gate to the sum of its experts: `moecc::moe_block`, for inference.

What it computes is said by IR text that the passes have fused. The op lowers that text for each power of two of tokens,
once, and runs the kernels that come out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_layer
from moecc.errors import MoeccError
from moecc.integrations.block_ir import lowered_shape
from moecc.integrations.experts_op import LIBRARY, define
from moecc.integrations.launchers import configs_for, token_bucket, tuned_configs

NAMES = ("gate", "router_bias", "correction_bias", "gate_up", "down", "gate_up_bias", "down_bias")
"""The weights in the order of the op's arguments, by the launcher's names."""


class BlockLauncher(Launcher):
    """A launcher of whole layers that can say what it launches on a device."""

    def launches_on(self, device: torch.device, tokens: int) -> tuple[str, ...]:
        """The kernels of one `forward`, in order. Raises RuntimeError for a device without kernels."""
        return self.launches(tokens, self._target(device))


@cache
def block_launcher(ir: str, tokens: int) -> BlockLauncher:
    """A launcher of the fused layer `ir`, with the configs that were tuned for `tokens`, or the default ones."""
    shape = lowered_shape(ir, tokens)
    return BlockLauncher(freeze_layer(shape), configs_for(shape, tuned_configs))


def _moe_block(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, ir = arguments
    weights = {n: t.contiguous() for n, t in zip(NAMES, tensors, strict=True) if t is not None}
    return block_launcher(ir, token_bucket(len(x))).forward(x, weights)


def _fake_moe_block(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _no_gradient(_: Any, __: Tensor) -> None:
    raise MoeccError(
        "a whole layer has no gradient",
        where="moecc::moe_block",
        hint="compile the model where gradients are wanted: its experts then are an op that has one",
    )


define(
    "moe_block(Tensor x, Tensor gate, Tensor? router_bias, Tensor? correction_bias, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str ir) -> Tensor",
    _moe_block,
    _fake_moe_block,
)
torch.library.register_autograd("moecc::moe_block", _no_gradient, lib=LIBRARY)
