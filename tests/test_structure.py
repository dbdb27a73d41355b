"""The shape of the source: imports flow one way, files stay small, `import moecc` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder or module imports only from ranks below its own, and from itself.
RANKS = {
    "errors": 0,
    "files": 1,
    "artifact": 2,
    "hardware": 1,
    "ir": 1,
    "solvers": 1,
    "passes": 2,
    "frontend": 2,
    "engines": 3,
    "codegen": 3,
    "autotune": 4,
    "build": 5,
    "runtime": 5,
    "integrations": 6,
    "doctor": 6,
    "plots": 6,
    "report": 6,
    "timeline": 6,
    "driver": 7,
    "api": 8,
    "cli": 8,
    "__init__": 8,  # the public face, which loads what it names when it is asked for
    "__main__": 9,
}
STAGES = ("ir", "passes", "codegen", "autotune", "solvers")
MAX_LINES = 500


def _sources() -> Iterator[Path]:
    for folder in ("moecc", *STAGES):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not (folder == "moecc" and path.relative_to(ROOT / "moecc").parts[0] in STAGES):
                yield path


def _part(path: Path) -> str:
    """The ranked name that a source file belongs to."""
    parts = path.relative_to(ROOT).parts
    return Path(parts[0] if parts[0] in STAGES else parts[1]).stem


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part of moecc) of every import in the file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module] if node.module != "moecc" else [f"moecc.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("moecc."):
                yield node.lineno, name.split(".")[1]


def test_the_x86_backend_stands_alone() -> None:
    for path in sorted((ROOT / "codegen" / "x86").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("moecc") or name.startswith("moecc.codegen.x86"), f"{path}: {name}"


def test_imports_flow_one_way() -> None:
    wrong = []
    for path in _sources():
        part = _part(path)
        for line, imported in _imports(path):
            if imported == "__version__" or imported == part:
                continue
            if RANKS[imported] >= RANKS[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} must not import {imported}")
    assert not wrong, "\n".join(wrong)


def test_solvers_ir_and_hardware_are_strangers() -> None:
    foreign = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in _sources()
        if _part(path) in ("hardware", "ir", "solvers")
        for line, name in _imports(path)
        if name not in (_part(path), "errors")
    ]
    assert not foreign, "\n".join(foreign)


def test_the_ir_knows_neither_torch_nor_ortools() -> None:
    for path in (ROOT / "ir").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch" not in text, path
        assert "ortools" not in text, path


@pytest.mark.parametrize("folder", ["moecc", *STAGES, "tests", "benchmarks", "examples"])
def test_files_stay_small(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if "golden" not in path.parts
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


HEAVY = ("torch", "triton", "ortools", "transformers", "pandas", "numpy", "yaml", "pydantic")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("moecc", ()),
        ("moecc.cli", ()),
        ("moecc.ir.parser", ()),
        ("moecc.hardware", ("yaml",)),
        ("moecc.codegen", ()),
        ("moecc.codegen.layers", ()),
        ("moecc.autotune.defaults", ()),
        ("moecc.autotune.cache", ()),
        ("moecc.passes.pipeline", ("numpy", "yaml")),
        ("moecc.frontend.model_yaml", ("yaml", "pydantic", "numpy")),
    ],
)
def test_imports_are_light(module: str, allowed: tuple[str, ...]) -> None:
    code = (
        f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules and m not in {allowed!r}])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""
