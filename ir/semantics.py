"""What a router and an activation compute: plain data shared by frontend, IR attributes, kernels and reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "sparsemixer"]
GroupScore = Literal["max", "top2_sum"]
ActivationKind = Literal[
    "silu_glu",
    "gelu_glu",
    "gelu_tanh_glu",
    "relu_glu",
    "clamped_swiglu",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
]


@dataclass(frozen=True, kw_only=True)
class Router:
    """From logits [tokens, experts] (fp32) to expert ids and weights [tokens, top_k] (int32, fp32).

    1. scores = score(logits) over all experts; with `select_first`, the top-k of the logits is taken first and
       the score is computed over the k selected logits (gpt-oss, GraniteMoE), which ends the procedure but for 5.
    2. selection scores = scores (+ correction bias if `selection_bias`; the bias never enters the weights).
    3. with `groups` > 1 only experts of the best `top_groups` groups stay selectable; a group's score is the
       maximum (DeepSeek-V2) or the sum of the two largest (DeepSeek-V3) selection scores in it.
    4. top-k by selection score, ties to the lower expert id; weights = scores of the selected; with `normalize`
       divided by max(sum + norm_eps, norm_min).
    5. weights *= scale.

    With score `sparsemixer` (PhiMoE, arXiv:2409.12136, in evaluation) 1 to 4 are instead: top-k by logit, ties to
    the lower expert id; the weight of each, in turn, is its softmax among those logits not taken before it that are
    near it: best - logit <= 2 jitter max(|logit|, best), where best is the logit that is taken.
    """

    score: Score = "softmax"
    select_first: bool = False
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    normalize: bool = False
    norm_eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What happens between the two expert GEMMs: to gate g and up u, or, in experts without a gate, to u alone.

    `<function>_glu`: function(g) * u.  `<function>`: function(u), and the weights named gate_up hold up alone.
    Functions: silu; gelu (exact) and gelu_tanh (its approximation by tanh); relu; relu2 = relu squared (Nemotron-H).
    clamped_swiglu (gpt-oss): g = min(g, limit), u = clamp(u, -limit, limit), (u + 1) * g * sigmoid(alpha * g).
    """

    kind: ActivationKind = "silu_glu"
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def gated(self) -> bool:
        return self.kind.endswith("_glu") or self.kind == "clamped_swiglu"

    @property
    def function(self) -> str:
        """What is applied to the gate, or to up where there is none."""
        return self.kind.removesuffix("_glu")

    def gate_up_columns(self, intermediate: int) -> int:
        """Outputs of the first expert GEMM."""
        return 2 * intermediate if self.gated else intermediate

    def intermediate_of(self, gate_up_columns: int) -> int | None:
        """The inverse; None for a number that gate and up cannot share."""
        if not self.gated:
            return gate_up_columns
        return None if gate_up_columns % 2 else gate_up_columns // 2


def why_impossible(router: Router, experts: int, top_k: int) -> tuple[str, str] | None:
    """(what, hint) if no token can be routed so, else None: the one predicate of IR and codegen."""
    groups, top_groups = router.groups, router.top_groups
    if not 1 <= top_k <= experts:
        return f"top_k {top_k} is larger than experts {experts}", f"top_k must be in [1, {experts}]"
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        what = f"{experts} experts cannot be limited to {top_groups} of {groups} groups"
        return what, "groups must divide experts, and top_groups must not exceed groups"
    selectable = experts // groups * top_groups
    if top_k > selectable:
        what = f"top_k {top_k} is larger than the {selectable} experts of {top_groups} groups"
        return what, f"top_k must be in [1, {selectable}]"
    if router.group_score == "top2_sum" and groups > 1 and experts // groups < 2:
        return "groups of one expert have no two best scores to add", "use group_score max"
    if router.score == "sparsemixer" and (
        router.select_first or router.selection_bias or groups > 1 or router.normalize
    ):
        what = "sparsemixer takes experts by their logits alone, and its weights as they are"
        return what, "remove select_first, the selection bias, groups and normalize"
    return None
