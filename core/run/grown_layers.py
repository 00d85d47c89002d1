"""Plans how layers with experts are made from layers with fewer, wider or no experts (`core.model.growth`)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.contracts.ffn import FeedForward, Networks
from core.model.growth import copies_of_groups, equal_rows, parts_of_width, with_noise
from core.model.language_model import LanguageModel
from core.recipe.selection import Selection

Tensors = Mapping[str, Tensor]
"""The source's tensors by name, each read when it is asked for."""

Make = Callable[[Tensors, Callable[[], Tensor]], Tensor]
"""Makes a whole tensor from the source's tensors and, if it calls for it, from its drawn values."""


@dataclass(frozen=True)
class Grown:
    """A tensor that is made from others.

    Args:
        make: makes it.
        reads_drawn: whether it keeps some of its drawn values.
        uses: names of the source's tensors.
    """

    make: Make
    reads_drawn: bool = False
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class GrownLayer:
    """A layer whose experts are made.

    Args:
        tensors: those that are made, by name in the model.
        drawn: names of its tensors that are drawn.
        sentence: what is made of what.
        is_exact: whether it computes what its source did, before any step.
    """

    tensors: dict[str, Grown]
    drawn: tuple[str, ...]
    sentence: str
    is_exact: bool


def feed_forward_layers(model: LanguageModel) -> Iterator[tuple[str, FeedForward]]:
    """Yields the feed-forward layers of a model, heads' own included, by their paths."""
    for block, name, layer in model.block_layers():
        if isinstance(layer, FeedForward):
            yield f"{block}.{name}", layer


def grown_layers(
    model: LanguageModel, source: LanguageModel, selection: Selection, where: str
) -> dict[str, GrownLayer]:
    """Plans the layers whose experts differ from those of the source, by path.

    Args:
        model: the model, whole.
        source: that of the source; both may be on the meta device.
        selection: what is asked for.
        where: the key and the source, with which error messages begin.

    Raises:
        UserError: the sizes do not allow what is asked for, or there is no such layer.
    """
    theirs = dict(feed_forward_layers(source))
    found: dict[str, GrownLayer] = {}
    for path, layer in feed_forward_layers(model):
        ours = layer.networks()
        other = theirs[path].networks() if path in theirs else None
        if ours is None or other is None or ours.routed is None:
            continue
        if (ours.experts, ours.expert_hidden) == (other.experts, other.expert_hidden):
            continue
        found[path] = _Growth(path, layer, ours, other, selection, where).plan()
    if not found:
        why = "no layer of the model has other routed experts than the same layer there"
        raise UserError(f"{where}: experts = {selection.experts}: {why}")
    return found


class _Growth:
    """The growth of one layer."""

    def __init__(
        self,
        path: str,
        layer: FeedForward,
        ours: Networks,
        other: Networks,
        selection: Selection,
        where: str,
    ) -> None:
        self.path = path
        self.layer = layer
        self.ours = ours
        self.other = other
        self.selection = selection
        self.where = f"{where}: experts = {selection.experts}"
        self.is_dense = other.routed is None
        self.first = ours.hidden if self.is_dense and selection.experts == "split" else 0
        self.sources = 1 if self.is_dense else other.experts
        width = other.hidden - self.first if self.is_dense else other.expert_hidden
        self.parts = self._parts(width)
        self.copies = self._copies()

    def _parts(self, width: int) -> int:
        """How many experts one network of the source is divided into."""
        own = self.ours.expert_hidden
        if self.selection.experts == "copy":
            if own != width:
                raise self._error(f"expert_hidden is {own}, and must be {width} as in the source")
            return 1
        if width < own or width % own:
            taken = f" without the {self.first} of shared experts" if self.first else ""
            allowed = f"must divide the source's width {width}{taken}"
            raise self._error(f"expert_hidden is {own}, and {allowed}")
        return width // own

    def _copies(self) -> int:
        """How many copies there are of each network of the source."""
        each = self.sources * self.parts
        if self.ours.experts % each:
            allowed = f"must be a multiple of {each}"
            raise self._error(f"there are {self.ours.experts} experts, and their number {allowed}")
        return self.ours.experts // each

    def _error(self, why: str) -> UserError:
        return UserError(f"{self.where}: {self.path}: {why}")

    @property
    def neighbours(self) -> int:
        """How many experts have equal router rows: the parts of one copy of a dense layer, or all of one expert's."""
        return self.parts if self.is_dense else self.parts * self.copies

    def plan(self) -> GrownLayer:
        """Plans the tensors of the layer."""
        factor = self._factor()
        assert self.ours.routed is not None
        read = self.other.always if self.is_dense else self.other.routed
        assert read is not None
        matrices = tuple(f"{self.path}.{name}" for name in read)
        tensors = {}
        for index, name in enumerate(self.ours.routed):
            scale = factor if index == 1 else 1.0
            tensors[f"{self.path}.{name}"] = Grown(
                self._routed(matrices, index, scale), uses=matrices
            )
        if self.first and self.ours.always is not None:
            for index, name in enumerate(self.ours.always):
                tensors[f"{self.path}.{name}"] = Grown(self._shared(matrices, index), uses=matrices)
        tensors |= self._by_expert()
        drawn: list[str] = []
        if self.is_dense:
            router = [name for name in self.layer.state_dict() if not self._is_network(name)]
            drawn = [f"{self.path}.{n}" for n in router if f"{self.path}.{n}" not in tensors]
        return GrownLayer(tensors, tuple(drawn), self._sentence(factor), self._is_exact())

    def _is_network(self, name: str) -> bool:
        return name in (*(self.ours.always or ()), *(self.ours.routed or ()))

    def _factor(self) -> float:
        """The factor on down-projections that keeps the output, or the one that the recipe gives."""
        if self.selection.scale is not None:
            return self.selection.scale
        before = 1.0 if self.is_dense else self.other.gate_sum
        after = self.ours.gate_sum
        if before is None or after is None:
            why = "must be given, because the gates of this router do not add up to the same for every token"
            raise UserError(f"{self.where}: {self.path}: initial_weights.scale = null: {why}")
        return self.parts * before / after

    def _routed(self, matrices: tuple[str, ...], index: int, scale: float) -> Make:
        """Makes a stack of routed experts: the first matrices, or those that `scale` is applied to."""

        def make(tensors: Tensors, _: Callable[[], Tensor]) -> Tensor:
            gate_up, down = (_stack(tensors[name]) for name in matrices)
            width = self.ours.expert_hidden
            made = parts_of_width(gate_up, down, self.parts, first=self.first, width=width)[index]
            return copies_of_groups(made * scale if scale != 1 else made, self.parts, self.copies)

        return make

    def _shared(self, matrices: tuple[str, ...], index: int) -> Make:
        """Makes the shared experts from the first inner units of a dense layer."""

        def make(tensors: Tensors, _: Callable[[], Tensor]) -> Tensor:
            gate_up, down = (_stack(tensors[name]) for name in matrices)
            return parts_of_width(gate_up, down, 1, width=self.first)[index][0]

        return make

    def _by_expert(self) -> dict[str, Grown]:
        """Plans the rows of router and balancers."""
        weights = {name for name, _ in self.layer.named_parameters()}
        found: dict[str, Grown] = {}
        for name in self.ours.by_expert:
            whole = f"{self.path}.{name}"
            if not self.is_dense and name in self.other.by_expert:
                noisy = name in weights and self.selection.noise > 0
                found[whole] = Grown(self._rows(whole, noisy), noisy, (whole,))
            elif self.is_dense and self.neighbours > 1 and name in weights:
                found[whole] = Grown(self._equal(), True)
        return found

    def _rows(self, name: str, noisy: bool) -> Make:
        each = self.neighbours
        noise = self.selection.noise

        def make(tensors: Tensors, drawn: Callable[[], Tensor]) -> Tensor:
            rows = tensors[name].repeat_interleave(each, dim=0)
            return with_noise(rows, drawn(), noise, each) if noisy else rows

        return make

    def _equal(self) -> Make:
        each = self.neighbours

        def make(_: Tensors, drawn: Callable[[], Tensor]) -> Tensor:
            return equal_rows(drawn(), each)

        return make

    def _is_exact(self) -> bool:
        """Whether the layer computes what its source did."""
        ours = self.ours
        wanted = self.neighbours
        if self.is_dense:
            chooses = ours.top_k % wanted == 0
            same_shared = bool(self.first) or ours.always is None
        else:
            chooses = ours.top_k == self.other.top_k * wanted
            same_shared = ours.hidden == self.other.hidden
        together = ours.chooses_by_row or wanted == 1
        return (
            chooses
            and together
            and same_shared
            and ours.limit == self.other.limit
            and self.selection.scale is None
            and not self.selection.noise
        )

    def _sentence(self, factor: float) -> str:
        what = "the dense layer" if self.is_dense else f"{self.sources} experts"
        made = f"{self.ours.experts} experts from {what}"
        how = f"{self.copies} copies" if self.copies > 1 else "one copy"
        if self.parts > 1:
            how = f"{how} of {self.parts} parts each"
        if self.first:
            how = f"{how}, the first {self.first} inner units are shared"
        if self.is_dense:
            how = f"{how}; router rows are drawn"
        return f"{made} ({how}; down-projections times {factor:.6g})"


def _stack(matrix: Tensor) -> Tensor:
    """A stack of matrices; of one matrix a stack of one."""
    return matrix if matrix.ndim == 3 else matrix[None]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32 or wider, in which growth is computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
