"""The launcher's threads: which programs run, where, how often, and what goes wrong in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moecc.codegen.x86.abi import PrintKind

sys.path.insert(0, str(Path(__file__).parent))
from launcher_harness import Launch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def visit(grid: tuple[int, ...], threads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(threads)
    launch = Launch("visit", count="*i32", thread="*i64", when="*i64", clock="*i64")
    total = torch.Size(grid).numel()
    count = torch.zeros(total, dtype=torch.int32)
    thread, when = torch.full((2, total), -1, dtype=torch.int64)
    launch(grid, count, thread, when, torch.zeros(1, dtype=torch.int64))
    return count, thread, when


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1,), (2,), (3, 5), (7, 1, 11), (1, 1, 64), (1000,)])
def test_every_program_runs_once_and_each_thread_goes_in_grid_order(
    grid: tuple[int, ...], threads: int
) -> None:
    count, thread, when = visit(grid, threads)
    assert (count == 1).all()
    assert len(thread.unique()) <= threads
    for one in thread.unique():
        assert (when[thread == one].diff() > 0).all()


def test_a_program_may_wait_for_those_before_it() -> None:
    torch.set_num_threads(3)
    done = torch.zeros(501, dtype=torch.int32)
    done[0] = 1
    Launch("follow", done="*i32")((500,), done)
    assert done.all()


def test_many_launches_with_changing_threads() -> None:
    for number in range(200):
        count, _, _ = visit((1 + number % 17,), 1 + number % 4)
        assert (count == 1).all()


def test_an_empty_grid_runs_nothing_and_calls_the_hooks() -> None:
    calls: list[str] = []
    Launch("refuse", done="*i8", at="i64")((0, 4), None, 0, enter=calls.append, leave=calls.append)
    assert calls == ["metadata", "metadata"]


@pytest.mark.parametrize("grid", [(-1,), (2**31,), (2**30, 2**30, 2**30)])
def test_a_grid_that_cannot_be(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"refuse: the grid's axis \d has -?\d+ programs"):
        Launch("refuse", done="*i8", at="i64")(grid, None, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_program_is_named_and_the_rest_is_skipped(threads: int) -> None:
    torch.set_num_threads(threads)
    launch = Launch("refuse", traced=True, done="*i8", at="i64")
    done = torch.zeros(4 * 5000, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"^refuse: kernel.py:7:4: too far, in program \(3, 1, 0\)$"):
        launch((4, 5000), done, 7)
    assert not done[7]
    assert not done.all()
    launch((4, 5000), done, -1)
    assert done.all()


def test_a_failure_without_its_program() -> None:
    with pytest.raises(RuntimeError, match=r"^refuse: kernel.py:7:4: too far$"):
        Launch("refuse", done="*i8", at="i64")((4,), torch.zeros(4, dtype=torch.int8), 2)


@pytest.mark.parametrize("size", [64, 5000, 5 << 20])
def test_each_thread_has_an_arena_that_is_aligned(size: int) -> None:
    torch.set_num_threads(3)
    arena = torch.zeros(64, dtype=torch.int64)
    Launch("use_arena", arena=size, arena_out="*i64", bytes="i64")((64,), arena, size)
    assert (arena != 0).all()
    assert (arena % 64 == 0).all()
    starts = arena.unique()
    assert len(starts) <= 3
    assert (starts.diff() >= size).all()


def test_an_arena_that_cannot_be_had() -> None:
    with pytest.raises(
        MemoryError, match="use_arena: no memory for the tiles of a program, 4611686018427387904 bytes"
    ):
        Launch("use_arena", arena=1 << 62, arena_out="*i64", bytes="i64")((2,), None, 0)


def test_printed_lines_tell_program_and_index(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    values = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int16)
    launch = Launch("show", traced=True, x="*i16", count="i64", kind="i32", hex="i32")
    launch((1, 2), values, 6, PrintKind.I16, 0)
    expected = [
        f"pid (0, {p}, 0) idx ({i}, {j}) x: {values[i, j]}"
        for p in range(2)
        for i in range(2)
        for j in range(3)
    ]
    assert capsys.readouterr().out.splitlines() == expected
    launch((1,), values, 6, PrintKind.I16, 1)
    assert capsys.readouterr().out.splitlines()[1] == "pid (0, 0, 0) idx (0, 1) x: 0xfffe"
    Launch("show_scalar", traced=True)((1,))
    Launch("show_nothing", traced=True)((1, 1, 2))
    expected = ["pid (0, 0, 0) idx () n: -7", "pid (0, 0, 0) here", "pid (0, 0, 1) here"]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float16, PrintKind.F16),
        (torch.bfloat16, PrintKind.BF16),
        (torch.float32, PrintKind.F32),
        (torch.float64, PrintKind.F64),
        (torch.float8_e4m3fn, PrintKind.F8E4M3FN),
        (torch.float8_e5m2, PrintKind.F8E5M2),
    ],
)
def test_printed_floats(dtype: torch.dtype, kind: PrintKind, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.tensor([1.75, -0.015625, 0.0, -448.0, float("nan"), 2.0**-9]).to(dtype)
    Launch("show", traced=True, x="*i8", count="i64", kind="i32", hex="i32")((1,), values, 6, kind, 0)
    printed = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    torch.testing.assert_close(
        torch.tensor(printed, dtype=torch.float64), values.double(), atol=1e-6, rtol=0, equal_nan=True
    )


def test_all_programs_print_from_all_threads(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(3)
    Launch("show_scalar", traced=True)((300,))
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        f"pid ({p}, 0, 0) idx () n: -7" for p in range(300)
    )


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_programs_that_wait_for_each_other_all_run_at_once(programs: int) -> None:
    torch.set_num_threads(1)
    come = torch.zeros(1, dtype=torch.int32)
    Launch("meet", spins=True, come="*i32")((programs,), come)
    assert come.item() == programs


def test_too_many_programs_that_wait_for_each_other() -> None:
    with pytest.raises(
        RuntimeError, match="meet: its programs wait for each other, and 600 need a thread each; hint"
    ):
        Launch("meet", spins=True, come="*i32")((600,), torch.zeros(1, dtype=torch.int32))


def test_python_runs_meanwhile() -> None:
    flags = torch.zeros(3, dtype=torch.int32)

    def answer() -> None:
        while not flags[0]:
            time.sleep(0.001)
        flags[1] = 1

    thread = threading.Thread(target=answer)
    thread.start()
    Launch("wait_for_host", flags="*i32")((1,), flags)
    thread.join()
    assert flags[2]


def test_an_interrupt_is_raised_after_the_launch() -> None:
    flags = torch.zeros(3, dtype=torch.int32)

    def interrupt() -> None:
        while not flags[0]:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        flags[1] = 1

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, the interrupt comes between two bytecodes
        Launch("wait_for_host", flags="*i32")((1,), flags)
        for _ in range(1000):
            time.sleep(0.001)
    thread.join()
    assert flags[2]


def test_launches_from_several_threads() -> None:
    torch.set_num_threads(2)
    launch = Launch("visit", count="*i32", thread="*i64", when="*i64", clock="*i64")
    counts = torch.zeros(4, 50, dtype=torch.int32)

    def repeat(count: torch.Tensor) -> None:
        thread, when = torch.full((2, 50), -1, dtype=torch.int64)
        for _ in range(50):
            launch((50,), count, thread, when, torch.zeros(1, dtype=torch.int64))

    threads = [threading.Thread(target=repeat, args=(count,)) for count in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counts == 50).all()


def test_a_child_process_has_threads_of_its_own() -> None:
    visit((100,), 3)
    child = os.fork()
    if child == 0:
        count, thread, _ = visit((1000,), 3)
        os._exit(0 if (count == 1).all() and len(thread.unique()) >= 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count, _, _ = visit((100,), 3)
    assert (count == 1).all()


def test_subnormal_numbers_whatever_torch_flushes() -> None:
    out = torch.full((64,), float("nan"))
    smallest = torch.finfo(torch.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU flushes nothing")
    try:
        torch.set_num_threads(2)
        Launch("multiply", out="*fp32", x="fp32", y="fp32")((64,), out, smallest, 0.5)
        assert torch.tensor([smallest]).mul(0.5).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert (out == smallest / 2).all()


def test_hooks_run_around_the_launch() -> None:
    calls: list[str] = []
    done = torch.zeros(1, dtype=torch.int8)
    launch = Launch("refuse", done="*i8", at="i64")
    launch(
        (1,),
        done,
        -1,
        enter=lambda _: calls.append(f"enter {done.item()}"),
        leave=lambda _: calls.append("leave"),
    )
    assert calls == ["enter 0", "leave"]

    def broken(_: object) -> None:
        raise LookupError("hook")

    done.zero_()
    with pytest.raises(LookupError, match="hook"):
        launch((1,), done, -1, enter=broken)
    assert not done


def test_a_chain_of_no_hooks_is_not_called() -> None:
    launch = Launch("refuse", done="*i8", at="i64")
    launch((1,), torch.zeros(1, dtype=torch.int8), -1, enter=SimpleNamespace(calls=[]), leave=None)


def test_the_longest_number_fits_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    most = torch.tensor([-torch.finfo(torch.float64).max] * 6, dtype=torch.float64)
    Launch("show", traced=True, x="*fp64", count="i64", kind="i32", hex="i32")(
        (1,), most, 6, PrintKind.F64, 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.rpartition(" ")[2]) for line in lines] == most.tolist()
