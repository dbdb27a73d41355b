"""Attributes and checks that several operations share."""

from __future__ import annotations

from typing import cast, get_args

from moecc.ir.core import Op, attr
from moecc.ir.semantics import Activation, ActivationKind, GroupScore, Router, Score, why_impossible
from moecc.ir.types import RoutingType, TokensType, WeightsType


class RouterFields:
    """The attributes of `Router`, for the ops that route."""

    top_k = attr(int, min=1, max=256)
    score = attr(str, default="softmax", one_of=get_args(Score))
    select_first = attr(bool, default=False)
    selection_bias = attr(bool, default=False)
    groups = attr(int, default=1, min=1)
    top_groups = attr(int, default=1, min=1)
    group_score = attr(str, default="max", one_of=get_args(GroupScore))
    normalize = attr(bool, default=False)
    norm_eps = attr(float, default=0.0, min=0)
    norm_min = attr(float, default=0.0, min=0)
    scale = attr(float, default=1.0)
    jitter = attr(float, default=0.0, min=0)


ROUTER_ATTRIBUTES = tuple(name for name in vars(RouterFields) if not name.startswith("_") and name != "top_k")


class ActivationFields:
    """The attributes of `Activation`, for the ops that hold an expert's gate-up GEMM."""

    activation = attr(str, default="silu_glu", one_of=get_args(ActivationKind))
    alpha = attr(float, default=1.702)
    limit = attr(float, default=7.0)


ACTIVATION_ATTRIBUTES = ("activation", "alpha", "limit")


def tokens_of(op: Op, name: str = "x") -> TokensType:
    return cast(TokensType, op.operands[name][0].type)


def weights_of(op: Op, name: str, rank: int) -> WeightsType:
    weights = cast(WeightsType, op.operands[name][0].type)
    if len(weights.shape) != rank:
        raise op.fail(f"{name} must have {rank} dimensions, not {weights}")
    return weights


def routing_of(op: Op, name: str = "routing") -> RoutingType:
    return cast(RoutingType, op.operands[name][0].type)


def require_same(op: Op, what: str, left: object, right: object) -> None:
    if left != right:
        raise op.fail(f"{what} disagree: {left} and {right}")


def require_vector(op: Op, name: str, size: int) -> None:
    if name in op.operands:
        require_same(op, f"sizes of {name}", weights_of(op, name, 1).shape[0], size)


def check_router(op: Op, experts: int) -> None:
    router = Router(**{name: op.attributes[name] for name in ROUTER_ATTRIBUTES})
    if problem := why_impossible(router, experts, op.attributes["top_k"]):
        raise op.fail(*problem)
    if op.attributes["selection_bias"] != ("correction_bias" in op.operands):
        raise op.fail("selection_bias must be true exactly where a correction_bias is given")
    require_vector(op, "correction_bias", experts)


def check_experts(op: Op, hidden: int, experts: int) -> int:
    count, columns, gate_hidden = weights_of(op, "gate_up", 3).shape
    require_same(op, "expert counts", count, experts)
    require_same(op, "hidden sizes", hidden, gate_hidden)
    require_expert_bias(op, "gate_up_bias", (experts, columns))
    return intermediate_of(op, columns)


def intermediate_of(op: Op, gate_up_columns: int) -> int:
    """The intermediate size of a gate_up that stacks gate and up, or, where the activation has no gate, is up alone."""
    activation = Activation(kind=op.attributes.get("activation", "silu_glu"))
    intermediate = activation.intermediate_of(gate_up_columns)
    if intermediate is None:
        raise op.fail(f"gate_up has {gate_up_columns} rows, which gate and up cannot share")
    return intermediate


def require_expert_bias(op: Op, name: str, shape: tuple[int, int]) -> None:
    if name in op.operands:
        require_same(op, f"shapes of {name}", weights_of(op, name, 2).shape, shape)
