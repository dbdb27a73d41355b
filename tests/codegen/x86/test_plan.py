"""What is stored and what is evaluated where it is used: the order of memory decides, then the cost."""

from __future__ import annotations

import struct

import pytest

from moecc.codegen.x86.features import LEVELS
from moecc.codegen.x86.lower import COSTLY, INLINE, lower_kernel
from moecc.codegen.x86.plan import make_plan
from moecc.codegen.x86.steps import range_of, shift_of, step
from moecc.codegen.x86.tree import Op, parse_module

POINTERS = """
    %p = "tt.splat"(%x) : (!tt.ptr<f32>) -> tensor<64x!tt.ptr<f32>>
    %i = "tt.make_range"() <{end = 64 : i32, start = 0 : i32}> : () -> tensor<64xi32>
    %a = "tt.addptr"(%p, %i) : (tensor<64x!tt.ptr<f32>>, tensor<64xi32>) -> tensor<64x!tt.ptr<f32>>
    %q = "tt.splat"(%y) : (!tt.ptr<f32>) -> tensor<64x!tt.ptr<f32>>
    %b = "tt.addptr"(%q, %i) : (tensor<64x!tt.ptr<f32>>, tensor<64xi32>) -> tensor<64x!tt.ptr<f32>>
"""


def kernel_text(body: str) -> str:
    """A kernel of two pointers to floats and an integer."""
    return f"""
"builtin.module"() ({{
  "tt.func"() <{{sym_name = "k", sym_visibility = "public"}}> ({{
  ^bb0(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>, %n: i32):
{POINTERS}{body}
    "tt.return"() : () -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def function(body: str) -> Op:
    (kernel,) = parse_module(kernel_text(body)).body().ops
    return kernel


def stored(body: str) -> set[str]:
    """Names of the tiles that the plan stores."""
    return {value.name for value in make_plan(function(body), INLINE, COSTLY).stored}


LOAD = '    %v = "tt.load"(%a) : (tensor<64x!tt.ptr<f32>>) -> tensor<64xf32>\n'
TWICE = '    %w = "arith.addf"(%v, %v) : (tensor<64xf32>, tensor<64xf32>) -> tensor<64xf32>\n'
STORE = '    "tt.store"({to}, {what}) : (tensor<64x!tt.ptr<f32>>, tensor<64xf32>) -> ()\n'


def test_a_load_waits_for_the_store_to_its_own_addresses() -> None:
    assert stored(LOAD + TWICE + STORE.format(to="%a", what="%w")) == set()


def test_a_load_does_not_wait_for_a_store_that_may_overlap_it() -> None:
    assert stored(LOAD + TWICE + STORE.format(to="%b", what="%w")) == {"%v"}


def test_a_load_does_not_pass_a_store_between() -> None:
    one = '    %one = "arith.constant"() <{value = dense<1.0> : tensor<64xf32>}> : () -> tensor<64xf32>\n'
    body = one + LOAD + STORE.format(to="%b", what="%one") + STORE.format(to="%a", what="%v")
    assert stored(body) == {"%v"}


def test_a_reversed_tile_is_read_before_any_of_it_is_written() -> None:
    there = '    %t = "tt.reshape"(%v) : (tensor<64xf32>) -> tensor<8x8xf32>\n'
    swapped = '    %s = "tt.trans"(%t) <{order = array<i32: 1, 0>}> : (tensor<8x8xf32>) -> tensor<8x8xf32>\n'
    back = '    %r = "tt.reshape"(%s) : (tensor<8x8xf32>) -> tensor<64xf32>\n'
    assert stored(LOAD + there + swapped + back + STORE.format(to="%a", what="%r")) == {"%v"}


def test_what_is_costly_is_computed_once() -> None:
    exp = '    %e = "math.exp"(%v) : (tensor<64xf32>) -> tensor<64xf32>\n'
    both = STORE.format(to="%b", what="%e") + STORE.format(to="%b", what="%e")
    assert stored(LOAD + exp + both) == {"%e"}
    assert stored(LOAD + exp + STORE.format(to="%b", what="%e")) == {"%v"}


LOOP = """
    %zero = "arith.constant"() <{value = 0 : i32}> : () -> i32
    %four = "arith.constant"() <{value = 4 : i32}> : () -> i32
    %by = "arith.constant"() <{value = dense<64> : tensor<64xi32>}> : () -> tensor<64xi32>
    %l = "scf.for"(%zero, %n, %four, %a) ({
    ^bb0(%j: i32, %c: tensor<64x!tt.ptr<f32>>):
      %u = "tt.load"(%c) : (tensor<64x!tt.ptr<f32>>) -> tensor<64xf32>
      "tt.store"(%c, %u) : (tensor<64x!tt.ptr<f32>>, tensor<64xf32>) -> ()
      %next = "tt.addptr"(%c, %by) : (tensor<64x!tt.ptr<f32>>, tensor<64xi32>) -> tensor<64x!tt.ptr<f32>>
      "scf.yield"(%next) : (tensor<64x!tt.ptr<f32>>) -> ()
    }) : (i32, i32, i32, tensor<64x!tt.ptr<f32>>) -> tensor<64x!tt.ptr<f32>>
"""


def test_pointers_that_a_loop_moves_on_are_one_number() -> None:
    kernel = function(LOOP)
    (loop,) = (op for op in kernel.walk() if op.name == "scf.for")
    counter, carried = loop.body().arguments
    shift = shift_of(carried)
    assert shift is not None
    assert (shift.initial.name, shift.increment.name) == ("%a", "%by")
    assert shift_of(counter) is None
    assert step(carried, 0) == 1


def test_ranges_and_steps_of_integers() -> None:
    kernel = function(
        """
    %seven = "arith.constant"() <{value = dense<7> : tensor<64xi32>}> : () -> tensor<64xi32>
    %m = "arith.muli"(%i, %seven) : (tensor<64xi32>, tensor<64xi32>) -> tensor<64xi32>
    %r = "arith.remsi"(%m, %seven) : (tensor<64xi32>, tensor<64xi32>) -> tensor<64xi32>
    %s = "tt.splat"(%n) : (i32) -> tensor<64xi32>
    %o = "arith.addi"(%s, %i) : (tensor<64xi32>, tensor<64xi32>) -> tensor<64xi32>
"""
    )
    values = {result.name: result for op in kernel.walk() for result in op.results}
    assert (range_of(values["%m"]), step(values["%m"], 0)) == ((0, 441), 7)
    assert (range_of(values["%r"]), step(values["%r"], 0)) == ((0, 6), None)
    assert (range_of(values["%o"]), step(values["%o"], 0)) == ((-(1 << 31), (1 << 31) - 1), 1)


@pytest.mark.parametrize(
    "items", ["[1.0, 2.5, -0.0, 1.0e3]", '"0x0000803F00002040000000800000 7A44"'.replace(" ", "")]
)
def test_a_constant_of_several_numbers_listed_or_as_bytes(items: str) -> None:
    body = f"""
    %v = "arith.constant"() <{{value = dense<{items}> : tensor<4xf32>}}> : () -> tensor<4xf32>
    %j = "tt.make_range"() <{{end = 4 : i32, start = 0 : i32}}> : () -> tensor<4xi32>
    %r = "tt.splat"(%x) : (!tt.ptr<f32>) -> tensor<4x!tt.ptr<f32>>
    %s = "tt.addptr"(%r, %j) : (tensor<4x!tt.ptr<f32>>, tensor<4xi32>) -> tensor<4x!tt.ptr<f32>>
    "tt.store"(%s, %v) : (tensor<4x!tt.ptr<f32>>, tensor<4xf32>) -> ()
"""
    (line,) = (
        line
        for line in lower_kernel(kernel_text(body), LEVELS["avx2"]).llvm_ir.splitlines()
        if line.startswith("@constant")
    )
    numbers = line.partition("] [")[2].partition("]")[0].split(", ")
    assert [_single(number) for number in numbers] == ["1.0", "2.5", "-0.0", "1000.0"]


def _single(text: str) -> str:
    """The float that LLVM's `float 0x…` (as a double) or `i32 …` (as bits) means."""
    kind, number = text.split(" ")
    form = ("<Q", "<d") if kind == "float" else ("<I", "<f")
    (value,) = struct.unpack(form[1], struct.pack(form[0], int(number, 0)))
    return str(value)
