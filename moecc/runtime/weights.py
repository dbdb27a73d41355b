"""The weights of one MoE layer out of a checkpoint, as the kernels of an artifact take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from moecc.codegen.config import LayerShape
from moecc.codegen.layers import KernelSet
from moecc.errors import InputError
from moecc.runtime.checkpoint import Checkpoint
from moecc.runtime.load import Weights
from moecc.runtime.weight_names import NAMES, PREFIXES, FamilyNames, Separate, Stacked

if TYPE_CHECKING:
    from torch import Tensor

NAMED_IN_ERRORS = 3
WHOLE = slice(None)
Size = tuple[int, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class LayerWeights:
    """routed: shared experts that are fused into them stand behind. shared: those that run apart.

    stored: the dtypes of the checkpoint's tensors, by torch's names.
    """

    routed: Weights
    shared: Weights | None
    stored: tuple[str, ...]


class Piece(NamedTuple):
    """A part of a stored tensor of shape `size`, and where it goes: `at` in the kernels' tensor `target`."""

    target: str
    at: Index
    tensor: str
    size: Size
    part: Index = (WHOLE,)
    transposed: bool = False
    interleaved: bool = False


def read_layer(
    checkpoint: Checkpoint, family: str, layer: int, routed: KernelSet, apart: KernelSet | None
) -> LayerWeights:
    """Reads the tensors of one layer and no others, converted to the dtype of its kernels.

    apart: the kernels of shared experts that have some of their own. Raises InputError for a family whose names are
    not known, a layer that is not there, and tensors that are missing, misshapen or quantised.
    """
    source, shape = _source(checkpoint, family, layer), routed.shape
    own: list[Piece] = []
    pieces = [*source.router(shape), *source.experts(shape)]
    if apart is not None:
        own += source.shared(apart.shape, 0, apart.shape.experts)
        own += source.shared_gate(apart.shape) if apart.entry == "forward" else ()
    elif shape.shared:
        pieces += source.shared(shape, shape.experts, shape.shared)
    _require(checkpoint, {piece.tensor: piece.size for piece in (*pieces, *own)})
    return LayerWeights(
        routed=_filled(checkpoint, shape, pieces),
        shared=None if apart is None else _filled(checkpoint, apart.shape, own),
        stored=tuple(sorted({checkpoint.dtype(piece.tensor) for piece in (*pieces, *own)})),
    )


def _source(checkpoint: Checkpoint, family: str, layer: int) -> _Source:
    if family not in NAMES:
        raise InputError(
            f"no names of weights are known for the family '{family}'",
            where="--weights",
            hint=f"compile the model from its config.json; known families: {', '.join(NAMES)}",
        )
    prefixes = [prefix.format(layer) for prefix in PREFIXES]
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in checkpoint.files)), None)
    if prefix is None:
        raise InputError(
            f"holds no tensors of layer {layer}",
            where=str(checkpoint.folder),
            hint=f"their names start with {' or '.join(prefixes)}",
        )
    return _Source(checkpoint, NAMES[family], prefix)


@dataclass(frozen=True)
class _Source:
    """One layer of a checkpoint: the pieces that its weights are put together from."""

    checkpoint: Checkpoint
    names: FamilyNames
    prefix: str

    def router(self, shape: LayerShape) -> Iterator[Piece]:
        names, size = self.names, (shape.experts,)
        yield Piece("gate", (WHOLE,), self._first(names.gate), (shape.experts, shape.hidden))
        if shape.has_router_bias:
            yield Piece("router_bias", (WHOLE,), self._first(names.router_bias), size)
        if shape.router.selection_bias:
            yield Piece("correction_bias", (WHOLE,), self._first(names.correction_bias), size)

    def experts(self, shape: LayerShape) -> Iterator[Piece]:
        """In the form that the checkpoint has them in; in the first of the family where it has none."""
        forms = self.names.experts
        form = next((f for f in forms if self.prefix + f.down.format(0) in self.checkpoint.files), forms[0])
        for expert in range(shape.experts):
            if isinstance(form, Stacked):
                yield from self._stacked(form, shape, expert)
            else:
                yield from self._separate(form, shape, expert, number=expert)

    def shared(self, shape: LayerShape, start: int, count: int) -> Iterator[Piece]:
        """The shared experts lie as one that is `count` times as wide; those of the layer start at `start`."""
        if self.names.shared is None:
            raise InputError("no names of shared experts are known", where="--weights", hint="compile again")
        for part in range(count):
            yield from self._separate(self.names.shared, shape, start + part, part=part, parts=count)

    def shared_gate(self, shape: LayerShape) -> Iterator[Piece]:
        yield Piece("gate", (WHOLE,), self._first(self.names.shared_gate), (1, shape.hidden))

    def _separate(
        self,
        form: Separate,
        shape: LayerShape,
        expert: int,
        *,
        number: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> Iterator[Piece]:
        """Part `part` of `parts` equal ones, along the intermediate dimension, of the matrices of one expert."""
        inner, hidden = shape.intermediate, shape.hidden
        mine = slice(part * inner, (part + 1) * inner)
        for row, name in enumerate(name for name in (form.gate, form.up) if name is not None):
            rows = slice(row * inner, (row + 1) * inner)
            tensor = self.prefix + name.format(number)
            yield Piece("gate_up", (expert, rows), tensor, (parts * inner, hidden), (mine,))
        tensor = self.prefix + form.down.format(number)
        yield Piece("down", (expert,), tensor, (hidden, parts * inner), (WHOLE, mine))

    def _stacked(self, form: Stacked, shape: LayerShape, expert: int) -> Iterator[Piece]:
        for target, name, size in (
            ("gate_up", form.gate_up, (shape.gate_up_columns, shape.hidden)),
            ("down", form.down, (shape.hidden, shape.intermediate)),
        ):
            interleaved = form.interleaved and target == "gate_up"
            stored = (shape.experts, *(size[::-1] if form.transposed else size))
            tensor = self.prefix + name
            yield Piece(target, (expert,), tensor, stored, (expert,), form.transposed, interleaved)
            if shape.has_expert_bias:
                bias = (shape.experts, size[0])
                tensor = f"{tensor}{form.bias}"
                yield Piece(f"{target}_bias", (expert,), tensor, bias, (expert,), interleaved=interleaved)

    def _first(self, names: tuple[str, ...]) -> str:
        """The whole name of the first that is there; of the first where none is."""
        whole = [self.prefix + name for name in names]
        return next((name for name in whole if name in self.checkpoint.files), whole[0])


def _require(checkpoint: Checkpoint, wanted: dict[str, Size]) -> None:
    missing = [name for name in wanted if name not in checkpoint.files]
    if missing:
        what = "1 tensor is" if len(missing) == 1 else f"{len(missing)} tensors are"
        raise InputError(
            f"{what} missing: {_some(missing)}",
            where=str(checkpoint.folder),
            hint="give a checkpoint of the model that was compiled, not quantised",
        )
    shapes = {name: checkpoint.shape(name) for name in wanted}
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(size)}"
        for name, size in wanted.items()
        if shapes[name] not in (size, (1, *size))
    ]
    if wrong:
        what = "1 tensor does" if len(wrong) == 1 else f"{len(wrong)} tensors do"
        raise InputError(
            f"{what} not fit the layer: {_some(wrong)}",
            where=str(checkpoint.folder),
            hint="give a checkpoint of the model that was compiled",
        )


def _some(items: list[str]) -> str:
    more = ["…"] if len(items) > NAMED_IN_ERRORS else []
    return ", ".join([*items[:NAMED_IN_ERRORS], *more])


def _filled(checkpoint: Checkpoint, shape: LayerShape, pieces: Iterable[Piece]) -> dict[str, Tensor]:
    import torch

    experts, hidden = shape.experts + shape.shared, shape.hidden
    sizes: dict[str, Size] = {
        "gate": (shape.experts, hidden),
        "router_bias": (shape.experts,),
        "correction_bias": (shape.experts,),
        "gate_up": (experts, shape.gate_up_columns, hidden),
        "down": (experts, hidden, shape.intermediate),
        "gate_up_bias": (experts, shape.gate_up_columns),
        "down_bias": (experts, hidden),
    }
    weights: dict[str, Tensor] = {}
    for piece in pieces:
        if piece.target not in weights:
            dtype = "float32" if piece.target == "correction_bias" else shape.dtype
            weights[piece.target] = torch.empty(sizes[piece.target], dtype=getattr(torch, dtype))
        place = weights[piece.target][piece.at]
        place.copy_(_arranged(checkpoint.read(piece.tensor, piece.part), piece).reshape(place.shape))
    return weights


def _arranged(part: Any, piece: Piece) -> Tensor:
    """The part as the kernels take it: outputs before inputs, gate before up."""
    import torch

    tensor: Tensor = part.mT if piece.transposed else part
    return torch.cat([tensor[::2], tensor[1::2]]) if piece.interleaved else tensor
