"""The kernels once more in Triton's interpreter, which shares no code with any compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING_CASES = ("test_layouts[both-bfloat16]", "test_activations[clamped_swiglu]")
CASES = (
    "test_families[1-deepseek-v3]",
    "test_families[17-gpt-oss]",
    "test_16_bit_types[mixtral-bfloat16]",
    "test_16_bit_types[gpt-oss-float16]",
    "test_router_split_over_hidden[deepseek-v3]",
    "test_experts_of_other_devices[0-20]",
    "test_nan_logits_still_give_distinct_experts",
)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    kernels, training = (Path(__file__).with_name(f"test_{name}.py") for name in ("kernels", "training"))
    cases = [f"{kernels}::{case}" for case in CASES] + [f"{training}::{case}" for case in TRAINING_CASES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, *cases],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert f"{len(cases)} passed" in done.stdout
