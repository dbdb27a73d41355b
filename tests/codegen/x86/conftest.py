"""Kernels that run compiled, in a process that the tests of a folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from compiled import Process, process


@pytest.fixture(scope="session")
def collective(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Runs the kernels of collective_kernels.py."""
    with process("collective_kernels", tmp_path_factory.mktemp("triton")) as started:
        yield started


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
