# mypy: ignore-errors
"""All that differs between Triton versions 3.5 to 3.9, and what its library of LLVM offers beyond Python's view."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from triton._C import libtriton
from triton._C.libtriton import ir, llvm, passes

TRIPLE = "x86_64-unknown-linux-gnu"


def run_passes(module, names):
    """Run passes, named `group.name`, over the module; one that this version lacks is no longer needed there."""
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    for name in names:
        group, _, add = name.partition(".")
        if hasattr(getattr(passes, group), f"add_{add}"):
            getattr(getattr(passes, group), f"add_{add}")(manager)
    try:
        manager.run(module, "make_ttir")
    except TypeError:
        manager.run(module)


def generic_form(module, context) -> str:
    """The module as MLIR prints what it cannot verify: in the generic form. The module itself stays as it was.

    The bindings can neither read dense constants nor ask for this form. An attribute of a module must have a
    dialect's prefix, so one without makes a copy invalid.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
        file.write(str(module))
        file.flush()
        copy = ir.parse_mlir_module(file.name, context)
    copy.context = context
    copy.set_attr("unprefixed", ir.builder(context).get_int32_attr(0))
    return str(copy)


@cache
def init_llvm() -> None:
    """Register the x86 target; from Triton 3.9 on its library registers only those of GPUs."""
    llvm.init_targets()
    library = ctypes.CDLL(libtriton.__file__)
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter", "AsmParser"):
        init = getattr(library, f"LLVMInitializeX86{part}", None)
        if init is not None:
            init()


def optimise(text: str, entry: str, signature, cpu: str, features: str) -> str:
    """LLVM IR text after O3. `entry` is the function that stays visible, `signature` its MLIR types.

    `translate_to_asm` optimises nothing, and only modules that come from MLIR can be optimised: a wrapper that calls
    the entry is translated, and the text linked into it.
    """
    init_llvm()
    types = ", ".join(signature)
    arguments = ", ".join(f"%a{i}" for i in range(len(signature)))
    parameters = ", ".join(f"%a{i}: {type_}" for i, type_ in enumerate(signature))
    wrapper = (
        f'module attributes {{llvm.target_triple = "{TRIPLE}"}} {{\n'
        f"  llvm.func @{entry}({types})\n"
        f"  llvm.func @kernel_entry({parameters}) {{\n"
        f"    llvm.call @{entry}({arguments}) : ({types}) -> ()\n    llvm.return\n  }}\n}}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wrapper.mlir").write_text(wrapper)
        (Path(folder) / "kernel.ll").write_text(text)
        context = ir.context()
        ir.load_dialects(context)
        module = ir.parse_mlir_module(str(Path(folder) / "wrapper.mlir"), context)
        module.context = context
        linked = llvm.to_module(module, llvm.context())
        llvm.attach_datalayout(linked, TRIPLE, cpu, features)
        llvm.link_extern_libs(linked, [str(Path(folder) / "kernel.ll")])
        llvm.optimize_module(linked, llvm.OPTIMIZE_O3, cpu, features, [], True)
        return str(linked)


def machine_code(text: str, cpu: str, features: str, *, assembly: bool = False):
    """The object file, or the assembly, of optimised LLVM IR."""
    init_llvm()
    arguments = (text, TRIPLE, cpu, features, [], True, not assembly)
    try:
        return llvm.translate_to_asm(*arguments)
    except TypeError:
        return llvm.translate_to_asm(*arguments, False)


def link(code: bytes) -> bytes:
    """A shared library of an object file; the C compiler that Triton needs anyway only links."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        source.write_bytes(code)
        subprocess.run(["cc", "-shared", "-nostdlib", "-o", target, source, "-lm"], check=True)
        return target.read_bytes()
