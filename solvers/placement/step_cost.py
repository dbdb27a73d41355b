"""The time of one expert layer as plain numbers: what a calibrated model of a machine hands to the placement."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moecc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A layer takes fixed_us + the largest, over devices, of the time for its rows and for the bytes it receives.

    compute_us_per_row: one token-expert pair on its device. tokens: of a step, on all devices together.
    bytes_per_token: of one copy of a token, both directions together (dispatch, and the partial result that comes
    back). us_per_byte_by_tier: of every tier of the problem's links, the device itself first; None: the links' own
    cost matrix is in us per byte.
    """

    compute_us_per_row: float
    fixed_us: float
    tokens: int
    bytes_per_token: float
    us_per_byte_by_tier: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (0.0 if value is None else value,):
                if not (math.isfinite(number) and number >= 0):
                    raise InputError(
                        f"{field.name} is {number}", where="step cost", hint="use finite numbers of 0 or more"
                    )
        if self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}", where="step cost", hint="use 1 or more")
