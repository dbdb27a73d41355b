"""Triton finds the backend, compiles through it, keeps what it made, and leaves other targets alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from moecc.codegen.x86 import activated
from moecc.codegen.x86.compiler import X86Backend
from moecc.codegen.x86.driver import X86Driver
from moecc.codegen.x86.errors import UnsupportedError
from moecc.codegen.x86.features import LEVELS, choose_level, supported_levels

sys.path.append(str(Path(__file__).parent))
import hand_written

pytestmark = pytest.mark.skipif(not supported_levels(), reason="not a CPU that this backend runs on")
LOWER = "moecc.codegen.x86.lower"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))


@pytest.fixture
def adder(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend active, and every kernel lowered to vadd."""
    module = hand_written.module("vadd", hand_written.ADD)
    monkeypatch.setitem(sys.modules, LOWER, module)
    with activated():
        yield module


def vadd_source(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


def new_vadd() -> Any:
    """A kernel that is compiled whatever other tests did; also where the tests interpret kernels."""
    return JITFunction(vadd_source)


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, size)
    return x, y, torch.full((size,), float("nan"))


def test_a_kernel_runs_on_tensors(adder: ModuleType) -> None:
    x, y, o = inputs(1000)
    kernel = new_vadd()[(8,)](x, y, o, 1000, B=128)
    assert torch.equal(o, x + y)
    assert "tt.load" in kernel.asm["ttir"]
    assert "define void @vadd" in kernel.asm["llvm"]
    assert "x float>" in kernel.asm["llir"], "O3 makes vectors of it"
    assert kernel.asm["so"].startswith(b"\x7fELF")
    o.fill_(float("nan"))
    kernel[(4, 1, 1)](x, y, o, 1000, 128)
    assert torch.equal(o[:512], (x + y)[:512])
    assert o[512:].isnan().all()


def test_options_of_gpus_are_accepted_and_share_machine_code(adder: ModuleType) -> None:
    x, y, o = inputs(256)
    vadd = new_vadd()
    vadd[(2,)](x, y, o, 250, B=128, num_warps=2)
    compiled = len(adder.texts)
    vadd[(2,)](x, y, o, 250, B=128, num_warps=8, num_stages=5, num_ctas=2, maxnreg=64)
    assert len(adder.texts) == compiled
    with pytest.raises(KeyError, match="num_wraps"):
        vadd[(2,)](x, y, o, 250, B=128, num_wraps=8)


def test_an_empty_grid(adder: ModuleType) -> None:
    x, y, o = inputs(128)
    new_vadd()[lambda meta: (0, 3)](x, y, o, 128, B=128)
    assert o.isnan().all()


def test_hooks_of_triton(adder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, o = inputs(128)
    names: list[str] = []
    chain = triton.knobs.runtime.launch_enter_hook
    enter = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    chain.add(enter)
    try:
        new_vadd()[(1,)](x, y, o, 128, B=128)
    finally:
        chain.remove(enter)
    assert names == ["vadd"]


def test_do_bench_and_autotune(adder: ModuleType) -> None:
    x, y, o = inputs(1024)
    configs = [triton.Config({"B": 128}, num_warps=4), triton.Config({"B": 128}, num_warps=8)]
    tuned = triton.autotune(configs, key=["n"], warmup=None)(new_vadd())
    tuned[lambda meta: (triton.cdiv(1024, meta["B"]),)](x, y, o, 1024)
    assert torch.equal(o, x + y)
    assert set(tuned.configs_timings) == set(configs)
    assert all(0 < time < 1e4 for times in tuned.configs_timings.values() for time in times)
    assert triton.testing.do_bench(lambda: x.add_(1), warmup=1, rep=2) > 0


def test_slots_of_tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    flags = [0, 0] if hasattr(TensorDescriptor, "round_f32_to_tf32") else [0]
    slots = 11 + len(flags)
    body = hand_written.COPY.replace("BYTES", str(8 * slots))
    monkeypatch.setitem(sys.modules, LOWER, hand_written.module("read", body))
    values = torch.zeros(7, 16, dtype=torch.float16)
    out = torch.zeros(slots, dtype=torch.int64)
    kernel = JITFunction(_read_source)
    with activated():
        kernel[(1,)](out, TensorDescriptor(values, [7, 13], [16, 1], [4, 8]), 5, B=1)
    assert out.tolist() == [out.data_ptr(), values.data_ptr(), 7, 13, 16, 1, *flags, 7, 13, 16, 1, 5]


def _read_source(out, d, n, B: tl.constexpr):
    tile = d.load([0, n])
    tl.store(out + tl.arange(0, 4)[:, None] + tl.arange(0, 8)[None, :], tile.to(tl.int64))


def test_what_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch, adder: ModuleType) -> None:
    def refuse(text: str, level: object, *, fuse: bool) -> None:
        raise UnsupportedError("tt.elementwise_inline_asm", hint="write it in Triton", where="kernel.py:3:8")

    monkeypatch.setattr(adder, "lower_kernel", refuse)
    x, y, o = inputs(64)
    with pytest.raises(UnsupportedError) as caught:
        new_vadd()[(1,)](x, y, o, 64, B=64)
    assert isinstance(caught.value, TritonError)
    expected = "kernel.py:3:8: x86: tt.elementwise_inline_asm is not supported; hint: write it in Triton"
    assert str(caught.value) == expected


def test_stages_are_printed(
    adder: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y, o = inputs(128)
    monkeypatch.setenv("MOECC_X86_DUMP", "ttir,asm")
    new_vadd()[(1,)](x, y, o, 128, B=128)
    printed = capfd.readouterr().err
    assert [line for line in printed.splitlines() if line.startswith("// ttir") or line == "// asm"] == [
        "// ttir",
        "// asm",
    ]
    assert "tt.func public @vadd_source" in printed
    assert "vaddps" in printed
    monkeypatch.setenv("MOECC_X86_DUMP", "ttir,ptx")
    with pytest.raises(
        ValueError, match="^MOECC_X86_DUMP: no stage is called 'ptx'; hint: ttir, llvm, llir, asm$"
    ):
        new_vadd()[(1,)](x, y, o, 128, B=128)


def test_levels_have_code_of_their_own(adder: ModuleType) -> None:
    x, y, o = inputs(128)
    vadd = new_vadd()
    for level in supported_levels():
        with activated(level):
            o.fill_(float("nan"))
            kernel = vadd[(1,)](x, y, o, 128, B=128)
        assert kernel.metadata.target.arch == level
        assert torch.equal(o, x + y)
    hashes = {X86Backend(GPUTarget("x86", level, 1)).hash() for level in LEVELS}
    assert len(hashes) == len(LEVELS)


def test_other_targets_compile_as_before(adder: ModuleType) -> None:
    types = {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32", "B": "constexpr"}
    compiled = triton.compile(ASTSource(new_vadd(), types, {"B": 128}), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"]
    assert not adder.texts


@pytest.mark.parametrize(
    ("asked", "gpu", "active"),
    [
        ("", False, True),
        ("", True, False),
        ("x86", True, True),
        ("nvidia", True, False),
        ("nvidia", False, False),
    ],
)
def test_active_where_no_gpu_is_or_when_asked_for(
    asked: str, gpu: bool, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: gpu))
    monkeypatch.setattr(
        triton.backends, "backends", {"x86": SimpleNamespace(driver=X86Driver), "nvidia": other}
    )
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", asked)
    assert X86Driver.is_active() == active


def test_a_level_comes_from_the_call_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_X86_LEVEL", supported_levels()[0])
    assert X86Driver().get_current_target() == GPUTarget("x86", supported_levels()[0], 1)
    assert X86Driver(choose_level()).level == choose_level()
    monkeypatch.delenv("MOECC_X86_LEVEL")
    assert X86Driver().level == choose_level()


def test_activated_gives_the_driver_back() -> None:
    before = triton.runtime.driver._active

    def inside() -> None:
        with activated("avx2"):
            assert triton.runtime.driver.active.level == "avx2"
            raise LookupError

    with pytest.raises(LookupError):
        inside()
    assert triton.runtime.driver._active is before


SECOND_PROCESS = """
import sys
sys.path.append({folder!r})
import hand_written
lower = hand_written.install("vadd", hand_written.ADD)
import torch, triton, triton.language as tl
assert [name for name in sys.modules if name.startswith("moecc.codegen.x86.") and "glue" in name] == []

@triton.jit
def vadd(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)

x, y = torch.randn(2, 300)
o = torch.full((300,), float("nan"))
vadd[(3,)](x, y, o, 300, B=128)
assert torch.equal(o, x + y)
print(len(lower.texts))
"""


def test_a_second_process_compiles_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", "x86")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = tmp_path / "script.py"
    script.write_text(SECOND_PROCESS.format(folder=str(Path(__file__).parent)))
    lowered = [
        subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert lowered == ["1\n", "0\n"]


LIGHT = """
import sys, {first}
import triton
heavy = [name for name in ("torch", "moecc.codegen.x86.glue", "moecc.codegen.x86.lower") if name in sys.modules]
assert "x86" in triton.backends.backends and heavy == {heavy}, heavy
"""


@pytest.mark.parametrize(
    ("first", "heavy"),
    [
        ("triton", []),
        ("moecc.codegen.x86", []),
        ("moecc.codegen.x86.driver", []),
        ("moecc.codegen.x86.compiler", []),
        ("moecc.codegen.x86.glue", ["moecc.codegen.x86.glue"]),
    ],
)
def test_any_order_of_imports_is_light(first: str, heavy: list[str]) -> None:
    subprocess.run([sys.executable, "-c", LIGHT.format(first=first, heavy=heavy)], check=True)


def test_the_interpreter_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = tmp_path / "script.py"
    script.write_text(SECOND_PROCESS.format(folder=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"
