"""Reads what a kernel occupies from its binary, with the disassemblers that Triton's wheel brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import MoeccError

# What the assembly calls a matrix multiplication, strongest first.
MATRIX_INSTRUCTIONS = {
    "tcgen05": "tcgen05.mma",
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "mfma": "v_mfma_",
    "amx": "tdpbf16ps",
}
_MULTIPLIES = (
    re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*|tdpbf16ps)"),
    re.compile(r"\b(FFMA2?|v_(pk_)?fmac?_f32\w*|vfmadd\w+ps)\b"),
)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one program occupies, read from the binary and not estimated; None where the target has no such thing.

    registers: per thread (on AMD vector and accumulation registers together).
    spill_bytes: memory of one thread for what found no register (AMD's scalar registers spill into vector
    registers, which is not memory).
    loop_instructions: machine instructions of the innermost loop that multiplies the most, 0 without one or where
    the compiler unrolled it entirely.
    matrix_instruction: tcgen05, wgmma, mma, mfma, amx, or empty.
    arena_bytes: on x86, memory of one thread for tiles that are large.
    """

    registers: int | None = None
    shared_bytes: int | None = None
    spill_bytes: int | None = None
    loop_instructions: int
    matrix_instruction: str
    num_warps: int | None = None
    arena_bytes: int | None = None


def read_resources(assembly: str, binary: bytes, *, shared_bytes: int, num_warps: int) -> Resources:
    """The resources of a cubin with its PTX, or of an hsaco with its AMD assembly.

    Triton asks for shared memory at launch, so the binary does not know it: `shared_bytes` comes from there.
    """
    if ".amdgcn_target" in assembly:
        listing = assembly
        registers = _field(assembly, r"\.vgpr_count:\s+(\d+)")
        spill_bytes = _field(assembly, r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        usage = _run_nvidia_tool("cuobjdump", binary, "-res-usage")
        registers = _field(usage, r"\bREG:(\d+)")
        listing = _run_nvidia_tool("nvdisasm", binary, "-c")
        # ptxas may reserve a stack frame that no instruction touches.
        touched = re.search(r"\b(STL|LDL)\b", listing) is not None
        spill_bytes = touched * (_field(usage, r"\bSTACK:(\d+)") + _field(usage, r"\bLOCAL:(\d+)"))
    return Resources(
        registers=registers,
        shared_bytes=shared_bytes,
        spill_bytes=spill_bytes,
        loop_instructions=count_loop_instructions(listing),
        matrix_instruction=_matrix_instruction(assembly),
        num_warps=num_warps,
    )


def read_x86_resources(assembly: str, *, arena_bytes: int) -> Resources:
    """The resources of x86 assembly. Spills are not told apart from tiles on the stack, so they are not counted."""
    return Resources(
        loop_instructions=count_loop_instructions(assembly),
        matrix_instruction=_matrix_instruction(assembly),
        arena_bytes=arena_bytes,
    )


def _matrix_instruction(assembly: str) -> str:
    return next((name for name, text in MATRIX_INSTRUCTIONS.items() if text in assembly), "")


def count_loop_instructions(listing: str) -> int:
    """Instructions of the innermost loop with the most multiplications: matrix ones, or scalar if there are none.

    A loop is a branch back to a label.
    """
    instructions, labels = _parse_listing(listing)
    loops = []
    for end, text in enumerate(instructions):
        for label in re.findall(r"\.L\w+", text):
            if label in labels and labels[label] <= end:
                loops.append((labels[label], end))
    for multiply in _MULTIPLIES:
        counts = {
            (start, end): sum(bool(multiply.search(text)) for text in instructions[start : end + 1])
            for start, end in loops
        }
        main = {
            loop: count for loop, count in counts.items() if count and not _contains_another(loop, counts)
        }
        if main:
            start, end = max(main, key=lambda loop: main[loop])
            return end + 1 - start
    return 0


def _contains_another(loop: tuple[int, int], counts: dict[tuple[int, int], int]) -> bool:
    """Whether a loop that multiplies lies inside; one that only waits for a barrier does not count."""
    return any(
        count and other != loop and loop[0] <= other[0] and other[1] <= loop[1]
        for other, count in counts.items()
    )


def _parse_listing(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of nvdisasm's or LLVM's listing in order, and the index that each label stands before."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
        elif re.match(r"\s+(/\*[0-9a-f]+\*/\s+\S|[a-z]+_\w+|[a-z]\w*\s*$|[a-z]\w*\t)", line):
            instructions.append(line)
    return instructions, labels


def _field(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise MoeccError(f"no {pattern!r} in the compiler's report", hint="is this Triton version supported?")
    return int(found[1])


def _run_nvidia_tool(tool: str, binary: bytes, option: str) -> str:
    import triton

    path = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
