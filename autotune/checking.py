"""Whether two results are one but for rounding, and whether configs from a cache compute what the default ones do."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from moecc.autotune.choose import Choice, choose
from moecc.autotune.defaults import default_configs
from moecc.autotune.layer_configs import UNIFORM
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.targets import find_target
from moecc.ir.semantics import Router

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
"""Root-mean-square difference, relative, that rounding in another order explains."""
CHECKED_TOKENS = 5


def choose_checked(shape: LayerShape, target: str, *, routing: str = UNIFORM) -> Choice:
    """`choose` for kernels that run now, on the device that is here: tuned configs are tried first.

    They and the default ones compute a few tokens on random weights, once in a process; where the results differ the
    default is taken, and said so.
    """
    choice = choose(shape, target, routing=routing)
    if choice.source == "default" or not (problem := _why_wrong(shape, target, choice.configs)):
        return choice
    log.warning("configs are the default ones: %s: %s", choice.because, problem)
    because = f"{choice.because}: {problem}"
    return Choice(configs=default_configs(shape, target), source="default", because=because)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of norms, in double precision; not a number where `found` holds one that is none."""
    exact = expected.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@cache
def _why_wrong(shape: LayerShape, target: str, configs: KernelConfigs) -> str:
    """The experts' kernels only: a router was compared when it was measured. As many experts as a token chooses."""
    if not _runs_here(target):
        return ""
    from moecc.autotune.device_worker import Bench, Task

    experts = shape.top_k + shape.shared
    small = replace(
        shape,
        tokens=CHECKED_TOKENS,
        received=None,
        shared=0,
        top_k=experts,
        experts=experts,
        slots=experts,
        router=Router(),
    )
    device = "cpu" if target == "x86" else "cuda"
    try:
        task = Task(
            shape=small,
            target=target,
            default=default_configs(shape, target),
            device=device,
            purpose="check",
        )
        return Bench(task).check(configs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _runs_here(target: str) -> bool:
    """Whether Triton would launch that target's kernels in this process."""
    import triton

    if triton.knobs.runtime.interpret:
        return False
    return bool(triton.runtime.driver.active.get_current_target().backend == find_target(target).backend)
