"""Ops in which elements of a tile meet, or programs: their tables, in one."""

from __future__ import annotations

from moecc.codegen.x86 import atomics, elements, exchange, gather, messages, reduce, scan
from moecc.codegen.x86.tiles import InlineRule, Rule

INLINE: dict[str, InlineRule] = {**exchange.INLINE}
RULES: dict[str, Rule] = {
    **reduce.RULES,
    **scan.RULES,
    **gather.RULES,
    **exchange.RULES,
    **elements.RULES,
    **atomics.RULES,
    **messages.RULES,
}
COSTLY: tuple[str, ...] = ()
