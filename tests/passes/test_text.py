"""Passes and their errors as text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from text_tests import check_text_test, text_tests

HERE = Path(__file__).parent / "text"


@pytest.mark.parametrize("path", text_tests(HERE), ids=lambda path: path.stem)
def test_text(path: Path) -> None:
    check_text_test(path)
