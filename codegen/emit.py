"""Writes one MoE layer as a standalone Python module: its kernels, its frozen configs, its launcher."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.frozen import kernel_sequence
from moecc.codegen.switches import freeze_configs, freeze_layer
from moecc.codegen.targets import find_target
from moecc.errors import InputError

# In reading order: what a name needs stands before it.
SOURCES = (
    "frozen.py",
    "kernels/common.py",
    "kernels/plan.py",
    "kernels/router.py",
    "kernels/activation.py",
    "kernels/gate_up.py",
    "kernels/down.py",
    "launcher.py",
)
IMPORTS = """\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
"""
LINE_LENGTH = 110


def emit_module(shape: LayerShape, configs: Mapping[str, KernelConfigs], name: str) -> str:
    """Source text of a module that imports only the standard library, torch and triton.

    configs: target name (a compiled target or `interpret`) -> configs; which one runs is decided by the device.
    The module offers, with the docstrings of `Launcher`: `forward(x, weights, *, residual=None, logits=None)`,
    `route(x, weights, *, logits=None)`, `experts(x, topk_ids, topk_weights, weights, *, residual=None)`,
    `launches(tokens, target)` and `workspace_bytes(tokens, target)`. The text is a function of the arguments
    alone. InputError for an unknown target or no configs.
    """
    if not configs:
        raise InputError("no configs to emit", where=name)
    for target in configs:
        find_target(target, where=name)
    parts = [_docstring(shape, configs, name), IMPORTS, *_definitions(), _tables(shape, configs), _exports()]
    return "".join(parts)


def _docstring(shape: LayerShape, configs: Mapping[str, KernelConfigs], name: str) -> str:
    router, activation = shape.router, shape.activation
    shared = f" and {shape.shared} shared" if shape.shared else ""
    held = f", {shape.slots} of them on a device" if shape.slots else ""
    select = "top-k of the logits, then " if router.select_first else ""
    groups = f", best {router.top_groups} of {router.groups} groups" if router.groups > 1 else ""
    counts = {
        target: " ".join(kernel_sequence(freeze_configs(chosen), shape.tokens))
        for target, chosen in configs.items()
    }
    lines = [
        f'"""{name}: one Mixture-of-Experts layer, emitted by moecc. Change the compiler, not this file.',
        "",
        f"{shape.experts} experts{shared}{held}, top-{shape.top_k}, hidden {shape.hidden}, intermediate "
        f"{shape.intermediate}, {shape.dtype}; tuned for {shape.tokens} tokens, right for any number.",
        f"Router: {select}{router.score}{groups}. Activation: {activation.kind}.",
        f"Launches of one forward at {shape.tokens} tokens:",
        *(f"    {target}: {kernels}" for target, kernels in counts.items()),
        "",
        "forward(x, weights) runs the layer, route(x, weights) its router, experts(x, topk_ids, topk_weights, "
        "weights) its experts for a routing made elsewhere; see Launcher. Without a GPU they run on CPU tensors where "
        "moecc is installed, or with TRITON_INTERPRET=1.",
        '"""',
    ]
    wrapped = [textwrap.fill(line, LINE_LENGTH, subsequent_indent="", drop_whitespace=True) for line in lines]
    return "\n".join(wrapped).replace("\n\n\n", "\n\n") + "\n\n"


def _definitions() -> Iterator[str]:
    """Every top-level definition of the sources, with the comments before it; imports and docstrings stay behind."""
    after_block = False
    for source in SOURCES:
        text = (Path(__file__).parent / source).read_text(encoding="utf-8")
        lines, end = text.splitlines(), 0
        for node in ast.parse(text).body:
            start, end = end, node.end_lineno or node.lineno
            if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node):
                continue
            is_block = isinstance(node, ast.FunctionDef | ast.ClassDef)
            body = "\n".join(lines[start:end])
            blank = 2 if is_block or after_block else min(len(body) - len(body.lstrip("\n")), 1)
            yield "\n" * blank + body.strip("\n") + "\n"
            after_block = is_block


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _tables(shape: LayerShape, configs: Mapping[str, KernelConfigs]) -> str:
    layer = freeze_layer(shape)
    fields = "".join(
        f"    {field}={_literal(value, len(field) + 1, 1)},\n" for field, value in vars(layer).items()
    )
    frozen = {target: freeze_configs(chosen) for target, chosen in configs.items()}
    head = "CONFIGS: Mapping[str, Config] = "
    return f"\n\nLAYER = Layer(\n{fields})\n{head}{_literal(frozen, len(head), 0)}\n"


def _literal(value: object, before: int, depth: int) -> str:
    """The value as the formatter would leave it, `before` characters into a line indented by `depth` steps.

    A mapping stands on one line if it fits and holds no other, else it takes a line an entry.
    """
    if not isinstance(value, Mapping):
        return _scalar(value)
    line = "{" + ", ".join(f"{_scalar(key)}: {_scalar(item)}" for key, item in value.items()) + "}"
    nested = any(isinstance(item, Mapping) for item in value.values())
    if not nested and 4 * depth + before + len(line) < LINE_LENGTH:
        return line
    indent = "    " * (depth + 1)
    entries = [
        f"{indent}{_scalar(key)}: {_literal(item, len(_scalar(key)) + 2, depth + 1)},\n"
        for key, item in value.items()
    ]
    return "{\n" + "".join(entries) + "    " * depth + "}"


def _scalar(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _exports() -> str:
    names = ("forward", "route", "experts", "launches", "workspace_bytes")
    return "\nlauncher = Launcher(LAYER, CONFIGS)\n" + "".join(
        f"{name} = launcher.{name}\n" for name in names
    )
