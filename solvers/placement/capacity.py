"""Device memory for experts as slots: engines give every device the same number, so the least memory counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.errors import InputError, Location


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """memory_bytes: what one device has for experts, or each of them in order.

    expert_bytes: of one expert of one layer. layers: those with experts; a slot is room for one expert in each.
    """

    memory_bytes: Sequence[float]
    expert_bytes: int
    layers: int

    def slots_per_device(
        self, experts: int, devices: int, *, asked: int | None = None, where: str | Location
    ) -> int:
        """As many as the least memory holds, at most one of each expert; or as many as are asked for, if they fit.

        Raises InputError, at `where`, if they do not, if all devices together cannot hold every expert, and for a
        memory that is no positive number of bytes or not one for all devices or one for each.
        """
        self._check(devices, where)
        slot, least = self.expert_bytes * self.layers, min(self.memory_bytes)
        fits, needed = min(experts, math.floor(least / slot + 1e-9)), -(-experts // devices)
        each = f"{self.layers} layers x {self.expert_bytes / 1e6:.4g} MB"
        if fits < needed:
            raise InputError(
                f"{least / 1e9:.4g} GB hold {fits} slots of {each}: {devices} devices cannot hold {experts} experts",
                where=where,
                hint=f"{needed} slots need {needed * slot / 1e9:.4g} GB on every device; or use more devices",
            )
        if asked is not None and asked > fits:
            raise InputError(
                f"{asked} slots per device of {each} need {asked * slot / 1e9:.4g} GB, not {least / 1e9:.4g}",
                where=where,
                hint=f"the memory holds {fits}: leave out slots_per_device, or lower it",
            )
        return fits if asked is None else asked

    def note(self, slots: int) -> str:
        """A sentence on what fits and what counted."""
        least, most = min(self.memory_bytes), max(self.memory_bytes)
        uneven = (
            f"; devices have up to {most / 1e9:.4g} GB, but engines give all the same number of slots"
            if most > least
            else ""
        )
        held = slots * self.layers * self.expert_bytes
        return (
            f"{least / 1e9:.4g} GB for experts on a device: {slots} slots of {self.layers} layers x"
            f" {self.expert_bytes / 1e6:.4g} MB take {held / 1e9:.4g} GB{uneven}"
        )

    def _check(self, devices: int, where: str | Location) -> None:
        if len(self.memory_bytes) not in (1, devices):
            raise InputError(
                f"{len(self.memory_bytes)} sizes of memory for {devices} devices",
                where=where,
                hint="give one for all devices, or one for each",
            )
        for size in self.memory_bytes:
            if not (math.isfinite(size) and size > 0):
                raise InputError(
                    f"{size / 1e9:g} GB is no size of a memory", where=where, hint="give a positive number"
                )
        if self.expert_bytes < 1:
            raise InputError(
                "the size of an expert is not known",
                where=where,
                hint="give --expert-mb, or name the model by --preset or --hf-config",
            )
