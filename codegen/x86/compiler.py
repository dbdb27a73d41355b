# mypy: ignore-errors
"""Triton's side of the compiler: TTIR -> LLVM IR -> optimised LLVM IR -> shared library.

Triton imports this module in every process that imports Triton: it stays light and imports what compiles when a kernel
is compiled.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from triton.backends.compiler import BaseBackend, GPUTarget, Language

from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import LEVELS, Level

TTIR_PASSES = (
    "common.inliner",
    "ttir.rewrite_tensor_pointer",
    "ttir.rewrite_tensor_descriptor_to_pointer",
    "common.canonicalizer",
    "ttir.combine",
    "ttir.reorder_broadcast",
    "common.cse",
    "common.licm",
    "common.symbol_dce",
    "ttir.loop_unroll",
    "common.canonicalizer",
    "common.cse",
)

DUMPS = ("ttir", "llvm", "llir", "asm")
"""What MOECC_X86_DUMP can name: before and after O3 are `llvm` and `llir`."""


@dataclass(frozen=True, kw_only=True)
class X86Options:
    """What a launch may ask for. Those about warps, stages, clusters and registers are accepted and mean nothing here:
    they keep their values of one, so that configurations that differ in them alone share their machine code."""

    num_warps: int = 1
    num_ctas: int = 1
    num_stages: int = 1
    warp_size: int = 1
    maxnreg: int | None = None
    cluster_dims: tuple[int, int, int] = (1, 1, 1)
    ptx_version: int | None = None
    ptx_options: str | None = None
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    ir_override: str | None = None
    enable_fp_fusion: bool = True
    enable_reflect_ftz: bool = False
    sanitize_overflow: bool = True
    debug: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e5")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: tuple = ()
    backend_name: str = "x86"
    arch: str = ""

    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


HONOURED = ("debug", "sanitize_overflow", "enable_fp_fusion", "default_dot_input_precision", "ir_override")


class X86Backend(BaseBackend):
    """Compiles for a target whose `arch` is the name of a level; the CPU need not have it."""

    binary_ext = "so"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "x86"

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.level: Level = LEVELS[target.arch]

    def hash(self) -> str:
        level = self.level
        return f"x86-{_sources_hash()}-{level.name}-{level.cpu}-{level.llvm}{_dump_nonce()}"

    def parse_options(self, opts: dict) -> X86Options:
        if opts.get("extern_libs"):
            raise UnsupportedError(
                "the option extern_libs", hint="call triton.language.extra.libdevice instead"
            )
        given = {name: opts[name] for name in HONOURED if opts.get(name) is not None}
        return X86Options(arch=self.level.name, **given)

    def pack_metadata(self, metadata) -> tuple:
        return ()

    def get_codegen_implementation(self, options) -> dict:
        return {"min_dot_size": lambda lhs, rhs: (1, 1, 1)}

    def get_module_map(self) -> dict:
        from moecc.codegen.x86 import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, context) -> None:
        """TTIR needs none beyond Triton's."""

    def add_stages(self, stages: dict, options: X86Options, language: Language = Language.TRITON) -> None:
        if language != Language.TRITON:
            raise UnsupportedError("Gluon, which is written for GPUs,", hint="use triton.language")
        stages["ttir"] = self.make_ttir
        stages["llvm"] = partial(self.make_llvm, fuse=options.enable_fp_fusion)
        stages["llir"] = self.make_llir
        stages["so"] = self.make_so

    def make_ttir(self, module, metadata: dict):
        from moecc.codegen.x86.glue import parameter_count, run_passes

        run_passes(module, TTIR_PASSES)
        metadata["slots"] = parameter_count(module)
        _dump("ttir", module)
        return module

    def make_llvm(self, module, metadata: dict, *, fuse: bool) -> str:
        from moecc.codegen.x86.glue import UnsupportedKernelError, generic_form, parameter_count
        from moecc.codegen.x86.lower import lower_kernel

        text = generic_form(module, module.context)
        try:
            lowered = lower_kernel(text, self.level, fuse=fuse)
        except UnsupportedError as error:
            raise UnsupportedKernelError(error.what, hint=error.hint, where=error.where) from None
        metadata.update(name=lowered.name, arena_bytes=lowered.arena_bytes, spins=lowered.spins)
        metadata.update(slots=parameter_count(module), traced='"tt.print"' in text or '"tt.assert"' in text)
        metadata.update(shared=0, tmem_size=None)
        _dump("llvm", lowered.llvm_ir)
        return lowered.llvm_ir

    def make_llir(self, llvm_ir: str, metadata: dict) -> str:
        from moecc.codegen.x86.glue import optimise
        from moecc.codegen.x86.lower import ENTRY_SIGNATURE

        text = optimise(llvm_ir, metadata["name"], ENTRY_SIGNATURE, self.level.cpu, self.level.llvm)
        _dump("llir", text)
        return text

    def make_so(self, text: str, metadata: dict) -> bytes:
        from moecc.codegen.x86.glue import link, machine_code

        if "asm" in requested_dumps():
            _dump("asm", machine_code(text, self.level.cpu, self.level.llvm, assembly=True))
        return link(machine_code(text, self.level.cpu, self.level.llvm))


def requested_dumps() -> tuple[str, ...]:
    """The stages that MOECC_X86_DUMP names; ValueError for one that there is not."""
    names = tuple(filter(None, os.environ.get("MOECC_X86_DUMP", "").split(",")))
    for name in names:
        if name not in DUMPS:
            raise ValueError(f"MOECC_X86_DUMP: no stage is called {name!r}; hint: {', '.join(DUMPS)}")
    return names


def _dump(stage: str, text) -> None:
    if stage in requested_dumps():
        print(f"// {stage}\n{text}", file=sys.stderr)


@cache
def _sources_hash() -> str:
    """Of every file that machine code depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _process_nonce() -> str:
    return uuid.uuid4().hex


def _dump_nonce() -> str:
    """What is asked to be printed has to be compiled."""
    return f"-{_process_nonce()}" if requested_dumps() else ""
