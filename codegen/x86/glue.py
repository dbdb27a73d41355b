# mypy: ignore-errors
"""All that differs between Triton versions 3.5 to 3.9, and what its library of LLVM offers beyond Python's view."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import triton.backends as triton_backends
from triton._C import libtriton
from triton._C.libtriton import ir, llvm, passes
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.build import compile_module_from_src

from moecc.codegen.x86.errors import UnsupportedError

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
        llvm.optimize_module(linked, llvm.OPTIMIZE_O3, cpu, features, [], False)
        return str(linked)


def machine_code(text: str, cpu: str, features: str, *, assembly: bool = False):
    """The object file, or the assembly, of optimised LLVM IR. Products and sums are fused where both say `contract`,
    not wherever they meet: that would break error-free sums."""
    init_llvm()
    arguments = (text, TRIPLE, cpu, features, [], False, not assembly)
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


class UnsupportedKernelError(UnsupportedError, TritonError):
    """A kernel that cannot be compiled, as users of Triton catch it."""


def compile_module(source: str, name: str):
    """A Python extension of C source, built once and kept in Triton's cache as its own are."""
    return compile_module_from_src(src=source, name=name, libraries=["m", "pthread"])


def swap_active_driver(new: object) -> object:
    """Make new the driver of this process; returns the one before, None where none had been chosen yet."""
    before = driver._active
    driver.set_active(new)
    return before


def other_backend_active(name: str) -> bool:
    """Whether a backend other than that of this name has a device here."""
    return any(other.driver.is_active() for key, other in triton_backends.backends.items() if key != name)


def descriptor_flags(descriptor) -> tuple[bool, ...]:
    """What a tensor descriptor says beside its sizes and strides, in the order of the kernel's arguments."""
    flags = (descriptor.padding == "nan",)
    return (*flags, descriptor.round_f32_to_tf32) if hasattr(descriptor, "round_f32_to_tf32") else flags


@cache
def descriptor_flag_count() -> int:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return 1 + ("round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__)


def parameter_count(module) -> int:
    """Of the kernel, as compiled."""
    kernel = module.get_function(module.get_entry_func_name())
    return len(module.get_function_signature(kernel))
