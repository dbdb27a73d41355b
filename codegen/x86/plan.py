"""Which tiles are stored in memory; all others are evaluated inline, lane by lane, where they are used.

Contract: a load is evaluated where the program has it, or later only if nothing between the two can write memory; a
costly value is computed once. Program order is the order of the text.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from moecc.codegen.x86.steps import shift_of, step
from moecc.codegen.x86.tree import Block, Op, Value

EFFECTS = frozenset(
    {
        "tt.store",
        "tt.descriptor_store",
        "tt.atomic_rmw",
        "tt.atomic_cas",
        "tt.call",
        "gpu.barrier",
        "ttg.barrier",
    }
    | {"tt.print", "tt.assert"}
)
"""Ops that write memory, or whose order with loads can be seen."""

FREE = frozenset(
    {"tt.splat", "tt.make_range", "tt.expand_dims", "tt.broadcast", "arith.constant", "tt.trans"}
)
HEAVY_FLOATS, HEAVY_INTEGERS = 8, 24
"""Ops under a value from which on it is stored rather than evaluated twice; integers are mostly scalars and ramps."""
DEEPEST = 64
"""Ops in a row that are evaluated inline: every one is a call inside the last one's."""


@dataclass(frozen=True)
class Plan:
    """`stored`: the tiles that are written to memory where they are defined."""

    stored: frozenset[Value]
    position: dict[Op, int]
    last: dict[Op, int]


@dataclass
class _Planner:
    inline: Container[str]
    costly: Container[str]
    position: dict[Op, int] = field(default_factory=dict)
    last: dict[Op, int] = field(default_factory=dict)
    effects: list[Op] = field(default_factory=list)
    stored: set[Value] = field(default_factory=set)
    sites: dict[Value, set[Op]] = field(default_factory=dict)
    weights: dict[Value, int] = field(default_factory=dict)
    depths: dict[Value, int] = field(default_factory=dict)
    replicated: set[Value] = field(default_factory=set)
    """Values of which some inline user evaluates an element more than once."""

    def number(self, op: Op) -> None:
        self.position[op] = len(self.position)
        if op.name in EFFECTS:
            self.effects.append(op)
        for region in op.regions:
            for block in region:
                for inner in block.ops:
                    self.number(inner)
        self.last[op] = len(self.position) - 1

    def decide(self, value: Value) -> None:
        """Users come later in the text, and were decided before."""
        self.sites[value] = set().union(*(self._sites_of_use(value, user) for user in value.users), set())
        op = value.op
        if op is None or not value.type.is_tensor:
            return
        if self._is_replicated(value):
            self.replicated.add(value)
        if op.name not in self.inline or self._must_store(value, op):
            self.stored.add(value)

    def _sites_of_use(self, value: Value, user: Op) -> set[Op]:
        if user.name == "scf.for":
            arguments = user.body().arguments[1:]
            found: set[Op] = set()
            for argument, initial in zip(arguments, user.operands[3:], strict=True):
                if initial is value:
                    carried = shift_of(argument) is not None
                    found |= self.sites.get(argument, set()) if carried else {user}
                    if carried:
                        found |= self.sites[user.results[arguments.index(argument)]]
            return found or {user}
        if user.name in self.inline and user.results:
            results = [result for result in user.results if result not in self.stored]
            if len(results) == len(user.results) and user.result.type.is_tensor:
                return set().union(*(self.sites[result] for result in results))
        return {user}

    def _must_store(self, value: Value, op: Op) -> bool:
        sites = self.sites[value]
        if op.name == "tt.load" and self._load_moves(op, sites):
            return True
        if op.name not in self.costly:
            return False
        if self._only_for_dots(value, op):
            return False
        return len(sites) > 1 or any(self._in_loop(site, op) for site in sites) or value in self.replicated

    def _only_for_dots(self, value: Value, op: Op) -> bool:
        """Dots of one block read it once, together."""
        sites = self.sites[value]
        return bool(sites) and all(site.name == "tt.dot" and site.block is op.block for site in sites)

    def _load_moves(self, load: Op, sites: set[Op]) -> bool:
        """Evaluating the load at its sites could see a later write."""
        if load.attributes.get("isVolatile") is True:
            return True
        start = self.position[load]
        for site in sites:
            outer = _ancestor(site, load.block)
            if outer is None:
                return True
            for effect in self.effects:
                if effect is site and self._same_elements(load, site):
                    continue
                if start < self.position[effect] <= self.last[outer]:
                    return True
        return False

    def _same_elements(self, load: Op, store: Op) -> bool:
        """Each element is read before it is written and no other one is: the store has the load's addresses."""
        if store.name != "tt.store" or store.operands[0] is not load.operands[0]:
            return False
        if not _are_distinct(store.operands[0]):
            return False
        return _elementwise_path(store.operands[1], load.result) and not any(
            load.result in _under(operand) for operand in (store.operands[0], *store.operands[2:])
        )

    def _in_loop(self, site: Op, op: Op) -> bool:
        """The site runs more often than the op."""
        block = site.block
        while block is not None and block is not op.block:
            if block.owner.name in ("scf.for", "scf.while"):
                return True
            block = block.owner.block
        return block is None

    def _is_replicated(self, value: Value) -> bool:
        for user in value.users:
            if user.name == "tt.broadcast":
                return True
            free = user.name in self.inline and user.results and user.result not in self.stored
            if free and user.result in self.replicated:
                return True
        return False

    def weigh(self, value: Value) -> None:
        """After all that is costly was decided: ops that one evaluation of the value takes."""
        op = value.op
        if op is None or value in self.stored or not value.type.is_tensor:
            self.weights[value] = self.depths[value] = 0
            return
        below = sum(self.weights.get(operand, 0) for operand in op.operands)
        self.weights[value] = min(below + (op.name not in FREE), 1000)
        self.depths[value] = 1 + max((self.depths.get(operand, 0) for operand in op.operands), default=0)
        limit = HEAVY_FLOATS if value.type.is_float else HEAVY_INTEGERS
        heavy = value.type.element != "ptr" and self.weights[value] > limit and self._often(value, op)
        if heavy or self.depths[value] > DEEPEST:
            self.stored.add(value)
            self.weights[value] = self.depths[value] = 0

    def _often(self, value: Value, op: Op) -> bool:
        if op.name == "tt.load" and self._only_for_dots(value, op):
            return False
        sites = self.sites[value]
        return len(sites) > 1 or any(self._in_loop(site, op) for site in sites) or value in self.replicated


def _ancestor(op: Op, block: Block | None) -> Op | None:
    """The op of that block that op is in."""
    here: Op | None = op
    while here is not None and here.block is not block:
        here = here.block.owner if here.block else None
    return here


def _are_distinct(pointers: Value) -> bool:
    """No two elements of a tile have one address: each step is longer than all shorter ones reach together."""
    sizes = enumerate(pointers.type.dims)
    moves = sorted((abs(step(pointers, dim) or 0), size) for dim, size in sizes if size > 1)
    reach = 0
    for by, size in moves:
        if by <= reach:
            return False
        reach += by * (size - 1)
    return reach < 1 << 31


def _under(value: Value) -> set[Value]:
    """The value and all that it is computed from, within its block and those around it."""
    seen, todo = {value}, [value]
    while todo:
        op = todo.pop().op
        fresh = [] if op is None else [operand for operand in op.operands if operand not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


def _elementwise_path(value: Value, load: Value) -> bool:
    """Every way from load to value keeps the place of each element."""
    return all(
        under.op is None
        or under.op.name in _KEEPS_PLACES
        or under.op.name.partition(".")[0] in ("arith", "math")
        for under in _under(value)
        if under is not load and load in _under(under)
    )


_KEEPS_PLACES = ("tt.fp_to_fp", "tt.bitcast")


def make_plan(function: Op, inline: Container[str], costly: Container[str]) -> Plan:
    """`inline`: ops that can be evaluated where they are used; `costly`: those of them worth computing once."""
    planner = _Planner(inline, costly)
    planner.number(function)
    for op in reversed(list(planner.position)):
        for region in op.regions:
            for block in region:
                for argument in block.arguments:
                    planner.decide(argument)
        for result in op.results:
            planner.decide(result)
    for op in planner.position:
        for result in op.results:
            planner.weigh(result)
    return Plan(frozenset(planner.stored), planner.position, planner.last)
