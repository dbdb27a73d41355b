"""Invariants that the parser cannot break but a pass can."""

from __future__ import annotations

import pytest

from moecc.errors import InputError
from moecc.ir.core import Function, Module, Value
from moecc.ir.ops import Plan, Residual, Split
from moecc.ir.rewriter import Replacement, Rule, rewrite
from moecc.ir.types import parse_type
from moecc.ir.verifier import verify
from moecc.passes.manager import Context, run_passes


def _function() -> tuple[Function, Value]:
    x = Value("x", parse_type("tokens<T x 4 x float32>"))
    split = Split({"x": x}, {"chunks": 2})
    both = Residual({"parts": split.parts})
    return Function("f", [x], [split, both], [both.total]), x


def test_a_value_is_defined_before_its_use() -> None:
    function, _ = _function()
    function.ops.reverse()
    with pytest.raises(InputError, match="%parts0 is used before it is defined"):
        verify(Module("m", [function]))


def test_a_returned_value_is_defined() -> None:
    function, _ = _function()
    function.ops.pop()
    with pytest.raises(InputError, match="@f returns %total, which is not defined"):
        verify(Module("m", [function]))


def test_result_types_follow_from_operands() -> None:
    function, x = _function()
    x.type = parse_type("tokens<T x 8 x float32>")
    with pytest.raises(InputError, match="result types are tokens<1/2\\*T x 8"):
        verify(Module("m", [function]))


def test_attributes_stay_as_declared() -> None:
    function, _ = _function()
    function.ops[0].attributes["chunks"] = "2"
    with pytest.raises(InputError, match="attribute 'chunks' must be int, not str"):
        verify(Module("m", [function]))


class _Breaks:
    name = "breaks"

    def run(self, module: Module, context: Context) -> None:
        module.functions[0].ops.reverse()


def test_the_pass_that_broke_the_module_is_named() -> None:
    function, _ = _function()
    with pytest.raises(InputError, match="after 'breaks': moe.residual: %parts0 is used"):
        run_passes(Module("m", [function]), [_Breaks()], Context())


def test_dead_ops_go_and_live_ones_stay() -> None:
    function, _ = _function()
    routing = Value("r", parse_type("routing<T x 2 of 4>"))
    function.arguments.append(routing)
    function.ops.append(Plan({"routing": routing}))
    assert rewrite(function, ()) == []
    assert [op.mnemonic for op in function.ops] == ["tensor.split", "moe.residual"]


def test_a_rule_that_never_ends_is_stopped() -> None:
    function, _ = _function()
    forever = Rule("forever", Split, lambda op, function: Replacement([op.rebuilt({})], {}))
    with pytest.raises(Exception, match=r"rules \['forever'\] do not terminate on @f"):
        rewrite(function, [forever])
