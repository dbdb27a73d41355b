"""A placement file against its traces: every recorded figure computed anew, with nothing of the solvers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from moecc.errors import InputError
from moecc.solvers.placement.links import Links
from moecc.solvers.placement.placement import Placement
from moecc.solvers.placement.problem import PlacementProblem
from moecc.solvers.placement.report import fingerprint, judge, judge_one
from moecc.solvers.placement.step_cost import StepCost
from moecc.solvers.routing import Routing

TOLERANCE = 1e-9
JUDGED = (
    "held_out_tokens",
    "before",
    "after",
    "in_sample",
    "executions",
    "affinity",
    "layers",
    "dispatch",
    "homes",
    "memory",
    "assumptions",
)


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """figures: how many were compared. wrong: one line for each that disagrees. skipped: what cannot be recomputed."""

    figures: int
    wrong: tuple[str, ...]
    skipped: tuple[str, ...]


def recheck(text: str, workloads: Sequence[Routing], *, where: str = "placement.json") -> Recheck:
    """Recompute the report and the certificate's objective of a placement file.

    workloads: the traces that it was made from, in any order; known by their content. Raises InputError for a file
    without a report and for other traces.
    """
    placement = Placement.from_json(text, where=where)
    data = json.loads(text)
    report, certificate = _section(data, "report", where), _section(data, "certificate", where)
    problem = _problem(report, placement, _matched(report, workloads, where), where)
    names = [row["layer"] for row in report["layers"]] if isinstance(report.get("layers"), list) else None
    unit = report["homes"].get("unit") if isinstance(report.get("homes"), dict) else None
    if unit not in (None, "sequence", "token"):
        raise InputError(f"homes by {unit!r} are unknown", where=where, hint="the file was changed")
    before, after = (judge_one(problem, side, unit) for side in (_identity(placement), placement))
    found = asdict(judge(problem, before, after, layer_names=names))
    pairs = list(_pairs("report", {key: found[key] for key in JUDGED}, report))
    pairs += _certificate_pairs(certificate, found["in_sample"]["after"]["objective"])
    wrong = [
        f"{key}: the file says {said!r}, it is {is_!r}" for key, said, is_ in pairs if not _equal(said, is_)
    ]
    skipped = [f"report.{key}" for key in ("unseen", "moves") if report.get(key)]
    return Recheck(
        figures=len(pairs),
        wrong=tuple(wrong),
        skipped=(*skipped, "certificate.bound") if certificate.get("bound") is not None else tuple(skipped),
    )


def _section(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict) or not section:
        raise InputError(f"it has no {name}", where=where, hint="only a file of `moecc place` can be checked")
    return section


def _matched(report: Mapping[str, Any], workloads: Sequence[Routing], where: str) -> tuple[Routing, ...]:
    """The traces in the file's order, with its names and weights."""
    by_content = {fingerprint(routing)["sha256"]: routing for routing in workloads}
    matched = []
    for name, recorded in _section(report, "traces", where).items():
        routing = by_content.get(recorded.get("sha256")) if isinstance(recorded, dict) else None
        if routing is None:
            raise InputError(
                f"none of the traces given is the one recorded as {name!r}",
                where=where,
                hint="give the traces that the placement was made from",
            )
        matched.append(replace(routing, name=name, weight=float(recorded.get("weight", 1.0))))
    return tuple(matched)


def _problem(
    report: Mapping[str, Any], placement: Placement, workloads: tuple[Routing, ...], where: str
) -> PlacementProblem:
    # The placement in force is not in the file, and with it its budget loses its meaning.
    known = {field.name for field in fields(PlacementProblem)} - {"in_force", "max_moved_bytes"}
    wanted = {key: value for key, value in _section(report, "request", where).items() if key in known}
    try:
        if wanted.get("links"):
            links = wanted["links"]
            wanted["links"] = Links(
                tiers=tuple(links["tiers"]),
                tier=np.array(links["tier"], np.int64),
                cost=np.array(links["cost"], np.float64),
            )
        if wanted.get("step_cost"):
            cost = wanted["step_cost"]
            by_tier = cost.get("us_per_byte_by_tier")
            wanted["step_cost"] = StepCost(
                **{**cost, "us_per_byte_by_tier": None if by_tier is None else tuple(by_tier)}
            )
        problem = PlacementProblem(workloads=workloads, **wanted)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"its request cannot be read ({error})", where=where, hint="it must be a file of `moecc place`"
        ) from None
    for field in ("devices", "devices_per_node", "slots_per_device", "num_experts"):
        if getattr(problem, field) != getattr(placement, field):
            raise InputError(
                f"{field} is {getattr(placement, field)}, but {getattr(problem, field)} in its request",
                where=where,
                hint="the file was changed",
            )
    return problem


def _identity(placement: Placement) -> Placement:
    row = np.arange(placement.slots, dtype=np.int32) % placement.num_experts
    return replace(placement, physical_to_logical=np.tile(row, (placement.layers, 1)))


def _certificate_pairs(certificate: Mapping[str, Any], objective: float) -> list[tuple[str, Any, Any]]:
    pairs = [("certificate.objective", certificate.get("objective"), objective)]
    bound = certificate.get("bound")
    if isinstance(bound, (int, float)):
        gap = max(0.0, (objective - bound) / objective)
        pairs.append(("certificate.gap", certificate.get("gap"), gap))
        pairs.append(("certificate.bound below the objective", bound <= objective * (1 + TOLERANCE), True))
    return pairs


def _pairs(key: str, found: Any, said: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, what the file says, what it is) of every leaf of `found`."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from _pairs(f"{key}.{name}", value, said.get(name) if isinstance(said, dict) else None)
    elif isinstance(found, list):
        rows = said if isinstance(said, list) else []
        for index in range(max(len(found), len(rows))):
            value, other = (r[index] if index < len(r) else None for r in (found, rows))
            yield from _pairs(f"{key}[{index}]", value, other)
    else:
        yield key, said, found


def _equal(said: Any, found: Any) -> bool:
    if isinstance(said, bool) or isinstance(found, bool) or not isinstance(said, (int, float)):
        return bool(said == found)
    return isinstance(found, (int, float)) and math.isclose(said, found, rel_tol=TOLERANCE, abs_tol=1e-12)
