"""Malformed IR: one located line that says what is wrong and how to mend it."""

from __future__ import annotations

import pytest

from moecc.errors import InputError
from moecc.ir.parser import parse_module
from moecc.ir.verifier import verify

TEMPLATE = """module @m {{
  func @f(%x: tokens<T x 16 x float32>, %g: weights<8 x 16 x float32>, %s: weights<2 x 8 x 16 x float32>, %d: weights<2 x 16 x 4 x float32>, %o: weights<1 x 16 x float32>) {{layers = [0]}} {{
    {line}
    return %x
  }}
}}
"""
GATE = "%l = moe.gate(x = %x, weight = %g) : tensor<T x 8 x float32>"
ROUTE = GATE + "\n    %r = moe.route(logits = %l) {attributes} : routing<T x 2 of 8>"

# line 3 of the template -> the error after "f.moe:"
IN_LINE = {
    "%a = moe.gat(x = %x) : tensor<T x 8 x float32>": "3:10: unknown operation 'moe.gat'; hint: operations are attn.opaque",
    "%a = moe.gate(x = %y, weight = %g)": "3:23: %y is not defined; hint: define it on an earlier line or as an argument",
    "%a = moe.gate(x = %x)": "3:10: moe.gate: operand 'weight' is missing",
    "%a = moe.gate(x = %x, weight = %x)": "3:10: moe.gate: operand 'weight' must be weights, not tokens<T x 16 x float32>",
    "%a = moe.gate(x = %x, w = %g)": "3:10: moe.gate: unknown operand 'w'; hint: operands are x, weight, bias",
    "%x = moe.gate(x = %x, weight = %g) : tensor<T x 8 x float32>": "3:5: %x is defined twice; hint: give one of them",
    "%a, %b = moe.gate(x = %x, weight = %g) : tensor<T x 8 x float32>": "3:14: moe.gate: has 1 results, not 2; hint: name",
    "%a = moe.gate(x = %x, weight = %g)": "3:10: moe.gate: result types are tensor<T x 8 x float32>, not ; hint: types",
    "%a = moe.gate(x = %x, weight = %g) : tensor<T x 9 x float32>": "3:10: moe.gate: result types are tensor<T x 8 x",
    "%a = moe.gate(x = %x, weight = %g) : tensor<T x 8 x float31>": "3:42: unknown dtype 'float31'; hint: dtypes are",
    "%a = moe.gate(x = %x, weight = %g) : tensor<U x 8 x float32>": "3:42: 'U' is not a size; hint: sizes look like",
    "%a = moe.plan(routing = %x) : routing<T x 2>": "3:35: malformed type 'routing<T x 2>'; hint: see",
    "moe.gate(x = %x, weight = %g)": "3:5: moe.gate: has 1 results, not 0; hint: name every result",
    "%a = tensor.split(x = %x) {chunks = 1} : tokens<T x 16 x float32>": "3:10: tensor.split: attribute 'chunks' must be at least 2",
    "%a = tensor.split(x = %x) {chunks = true} : tokens<T x 16 x float32>": "3:10: tensor.split: attribute 'chunks' must be int, not bool",
    "%a = tensor.split(x = %x) : tokens<T x 16 x float32>": "3:10: tensor.split: attribute 'chunks' is missing",
    "%a = tensor.split(x = %x) {chunk = 2} : tokens<T x 16 x float32>": "3:10: tensor.split: unknown attribute 'chunk'; hint: attributes are chunks",
    "%a = tensor.split(x = %x) {chunks = 2, chunks = 3} : tokens<T x 16 x float32>": "3:44: 'chunks' is given twice; hint: remove one",
    "%a = moe.gate(x = %x, x = %x, weight = %g)": "3:27: 'x' is given twice; hint: remove one of them",
    "%a = moe.residual(parts = []) : tokens<T x 16 x float32>": "3:10: moe.residual: needs at least one part",
    "%a = moe.gate(x = %x, weight = %g) ? tensor": "3:40: unexpected character '?'; hint: see docs/ir.md",
    "%a = moe.gate(x %x)": "3:21: expected '=', found '%x'; hint: see docs/ir.md",
    "%a = moe.shared_expert(x = %x, gate_up = %s, down = %d, gate = %g) : tokens<T x 16 x float32>": "3:10: moe.shared_expert: shapes of gate disagree: (8, 16) and (1, 16)",
    "%a = moe.shared_expert(x = %x, gate_up = %s, down = %d, gate = %o) : tokens<T x 16 x float32>": "3:10: moe.shared_expert: experts behind the gate disagree: 2 and 1",
    '%a = buffer.alloc() {type = "tokens<1>"} : tokens<T x 16 x float32>': "3:10: malformed type 'tokens<1>'; hint",
}
EXPERTS = """module @m {{
  func @f(%x: tokens<T x 16 x float16>, %g: weights<8 x 11 x 16 x float16>, %d: weights<8 x 16 x 11 x float16>) {{
    %y = moe.shared_expert(x = %x, gate_up = %g, down = %d) {{activation = "{kind}"}} : tokens<T x 16 x float16>
    return %y
  }}
}}"""
ROUTES = {
    "{top_k = 9}": "moe.route: top_k 9 is larger than experts 8; hint: top_k must be in [1, 8]",
    "{top_k = 2, groups = 3}": "moe.route: 8 experts cannot be limited to 1 of 3 groups; hint: groups must divide",
    "{top_k = 3, groups = 4}": "moe.route: top_k 3 is larger than the 2 experts of 1 groups; hint: top_k must be in [1, 2]",
    '{top_k = 2, score = "tanh"}': "moe.route: attribute 'score' must be one of softmax, sigmoid",
    "{top_k = 2, selection_bias = true}": "moe.route: selection_bias must be true exactly where a correction_bias is given",
    '{top_k = 2, score = "sparsemixer", normalize = true}': "moe.route: sparsemixer takes experts by their logits alone",
    '{top_k = 2, score = "sparsemixer", jitter = -0.1}': "moe.route: attribute 'jitter' must be at least 0",
    "{top_k = 0}": "moe.route: attribute 'top_k' must be at least 1",
}
WHOLE = {
    "": "1:1: expected 'module', found 'end of text'",
    "module @m {\n  func @f(": "2:11: expected a value such as %x, found 'end of text'",
    "module @m {a = {b = [1, }} {\n}": "1:25: expected a number or a text in quotes or 'true' or 'false' or 'null', found '}'",
    "module @m {\n}\n garbage": "3:2: expected the end, found 'garbage'",
    "module @m {a = 1e999} {\n}": "1:16: malformed number 1e999; hint: write it as in JSON",
    'module @m {a = "\\q"} {\n}': '1:16: malformed string "\\q"; hint: write it as in JSON',
    "module @m {a = "
    + "[" * 99
    + "]" * 99
    + "} {\n}": "1:81: attributes nest too deep; hint: at most 64 levels",
    "module @m {\n  func @f(%x: tokens<T x 1 x int8>) {\n    return %y\n  }\n}": "3:12: %y is not defined",
    "module @m {\n  func @f(%x: tokens<T x 1 x int8>) {\n    return %x\n  }\n  func @f(%x: tokens<T x 1 x int8>) {\n    return %x\n  }\n}": "5:3: function @f stands twice; hint: rename one of them",
}


def _error(text: str) -> str:
    with pytest.raises(InputError) as caught:
        verify(parse_module(text, "f.moe"))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("line", "expected"), IN_LINE.items())
def test_malformed_operation(line: str, expected: str) -> None:
    assert _error(TEMPLATE.format(line=line)).startswith(f"f.moe:{expected}")


@pytest.mark.parametrize(("attributes", "expected"), ROUTES.items())
def test_impossible_routing(attributes: str, expected: str) -> None:
    text = TEMPLATE.format(line=ROUTE.format(attributes=attributes))
    assert _error(text).startswith(f"f.moe:4:10: {expected}")


def test_only_gate_and_up_share_the_rows_of_gate_up() -> None:
    verify(parse_module(EXPERTS.format(kind="relu2"), "f.moe"))
    expected = "moe.shared_expert: gate_up has 11 rows, which gate and up cannot share"
    assert _error(EXPERTS.format(kind="relu_glu")).startswith(f"f.moe:3:10: {expected}")


@pytest.mark.parametrize(("text", "expected"), WHOLE.items())
def test_malformed_module(text: str, expected: str) -> None:
    assert _error(text).startswith(f"f.moe:{expected}")
