"""print -> parse -> print is identical for every op, and for whatever a random module holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError, Location
from moecc.ir import ops
from moecc.ir.core import Function, Module, Op, Value
from moecc.ir.parser import parse_module
from moecc.ir.printer import print_module
from moecc.ir.types import Type, parse_type
from moecc.ir.verifier import verify

ATTENTION = {
    "flops_per_token": 1.5,
    "flops_per_context_token": 2.0,
    "weight_bytes": 3,
    "kv_bytes_per_token": 4,
    "context": 5,
}
EXCHANGE = {
    "devices": 4,
    "slots": 2,
    "fan_out": 1.75,
    "remote_devices": 1.3,
    "remote_nodes": 0.0,
    "tasks": ["a.0"],
}
EXPERTS = {"gate_up": "weights<8 x 12 x 16 x float16>", "down": "weights<8 x 16 x 6 x float16>"}
BIASES = {"gate_up_bias": "weights<8 x 12 x float16>", "down_bias": "weights<8 x 16 x float16>"}
X, ROUTING, PLAN = "tokens<T x 16 x float16>", "routing<T x 3 of 8>", "plan<3*T of 8>"
GATE = "weights<8 x 16 x float16>"

# One instance of every op: operands by type, attributes.
CASES: dict[type[Op], tuple[dict[str, str | list[str]], dict[str, Any]]] = {
    ops.Attention: ({"x": X}, ATTENTION),
    ops.DenseMlp: ({"x": X, "gate_up": "weights<8 x 16 x float16>", "down": "weights<16 x 4 x float16>"}, {}),
    ops.Gate: ({"x": X, "weight": GATE, "bias": "weights<8 x float16>"}, {}),
    ops.Route: (
        {"logits": "tensor<T x 8 x float32>", "correction_bias": "weights<8 x float32>"},
        {"top_k": 3, "score": "sigmoid", "selection_bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
    ),
    ops.Split: ({"x": X}, {"chunks": 3}),
    ops.AllToAll: ({"x": X, "routing": ROUTING}, EXCHANGE | {"direction": "dispatch"}),
    ops.AllGather: ({"x": X}, {"devices": 4, "bytes_per_token": 12}),
    ops.Dispatch: ({"x": X, "routing": ROUTING}, {}),
    ops.Experts: (
        {"rows": "tokens<3*T x 16 x float16>", "routing": ROUTING, **EXPERTS, **BIASES},
        {"limit": 6.5},
    ),
    ops.Combine: ({"rows": "tokens<3*T x 16 x float16>", "routing": ROUTING}, {}),
    ops.SharedExpert: (
        {
            "x": X,
            "gate_up": "weights<1 x 12 x 16 x float16>",
            "down": "weights<1 x 16 x 6 x float16>",
            "gate": "weights<1 x 16 x float16>",
        },
        {"activation": "gelu_glu"},
    ),
    ops.Residual: ({"parts": [X, X]}, {}),
    ops.Concat: ({"parts": ["tokens<1/2*T x 16 x float16>"] * 2}, {}),
    ops.FusedRouter: ({"x": X, "weight": GATE}, {"top_k": 3, "shared": 2, "sort": True}),
    ops.Plan: ({"routing": "routing<7/4*T x 12/7 of 8>"}, {}),
    ops.GateUp: ({"x": X, "plan": PLAN, "gate_up": EXPERTS["gate_up"]}, {"activation": "clamped_swiglu"}),
    ops.DownCombine: (
        {"rows": "tokens<3*T x 6 x float16>", "plan": PLAN, "routing": ROUTING, "down": EXPERTS["down"]},
        {},
    ),
    ops.Alloc: ({}, {"type": PLAN}),
    ops.Launch: ({"reads": [X, GATE], "writes": [PLAN]}, {"kernel": "router", "suffix": "_shared"}),
}


def _module(kind: type[Op]) -> Module:
    operand_types, attributes = CASES[kind]
    arguments: list[Value] = []

    def argument(text: str) -> Value:
        arguments.append(Value(f"a{len(arguments)}", parse_type(text)))
        return arguments[-1]

    operands: dict[str, Any] = {
        name: [argument(t) for t in types] if isinstance(types, list) else argument(types)
        for name, types in operand_types.items()
    }
    op = kind(operands, attributes, location=Location("a b.yaml", 7, 3))
    function = Function("f", arguments, [op], [*op.all_results], {"layers": [1, 2]}, Location("m.yaml", 1, 1))
    function.returns = function.returns or arguments[:1]
    return Module("m", [function], {"nested": {"list": [[1, 2], [3, 4]], "odd key": 'a "quoted" text'}})


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(ops.OPS)


@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
@pytest.mark.parametrize("kind", ops.OPS, ids=lambda kind: kind.mnemonic)
def test_round_trip(kind: type[Op], bare: bool) -> None:
    module = _module(kind)
    if bare:
        module.attributes, module.functions[0].attributes, module.functions[0].location = {}, {}, None
    verify(module)
    text = print_module(module)
    parsed = parse_module(text)
    verify(parsed)
    if bare:
        assert parsed.functions[0].location == Location("<text>", 2, 3)
        parsed.functions[0].location = None
    assert print_module(parsed) == text
    op, again = module.functions[0].ops[0], parsed.functions[0].ops[0]
    assert again.attributes == op.attributes
    assert again.location == op.location
    assert [v.type for v in again.all_results] == [v.type for v in op.all_results]


sizes = st.integers(1, 1 << 20)
fractions = st.fractions(min_value="1/64", max_value=512, max_denominator=64)


@given(rows=fractions, hidden=sizes, top_k=fractions, experts=sizes)
def test_types_round_trip(rows: Any, hidden: int, top_k: Any, experts: int) -> None:
    for text in (
        f"tokens<{rows}*T x {hidden} x bfloat16>",
        f"tensor<T x {hidden} x {experts} x float32>",
        f"weights<{hidden} x {experts} x int8>",
        f"routing<{rows}*T x {top_k} of {experts}>",
        f"plan<{rows}*T of {experts}>",
    ):
        type: Type = parse_type(text)
        assert parse_type(str(type)) == type


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(attributes=st.dictionaries(st.text(min_size=1), json_values, max_size=4))
def test_attributes_round_trip(attributes: dict[str, Any]) -> None:
    module = Module("m", [], attributes)
    parsed = parse_module(print_module(module))
    assert parsed.attributes == attributes


@given(data=st.data())
def test_damaged_text_is_an_input_error_or_another_module(data: st.DataObject) -> None:
    """Deleting, doubling or replacing a piece of valid text never raises anything but InputError."""
    text = print_module(_module(data.draw(st.sampled_from(ops.OPS))))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    junk = data.draw(
        st.sampled_from(["", "%", "@x", '"', "{", "}", "loc(", "9" * 5000, "-", "tokens<", "=", "\x00"])
    )
    damaged = text[:start] + junk + text[end:]
    try:
        verify(parse_module(damaged, "f.moe"))
    except InputError as error:
        assert "\n" not in str(error)
