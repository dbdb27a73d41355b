"""Ops in which elements of a tile meet, or programs: their tables, in one."""

from __future__ import annotations

from moecc.codegen.x86 import reduce
from moecc.codegen.x86.tiles import InlineRule, Rule

INLINE: dict[str, InlineRule] = {}
RULES: dict[str, Rule] = {**reduce.RULES}
COSTLY: tuple[str, ...] = ()
