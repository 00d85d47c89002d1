"""What a component is told about the model around it when it is built."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from core.contracts.errors import UserError, nearest
from core.contracts.precision import ROLES, Precision
from core.contracts.schema import Section


@dataclass(frozen=True)
class Rope:
    """Rotary positions, shared by every attention of a model (see `core.model.rope`).

    Args:
        theta: the base of the frequencies.
        max_length: positions that the table holds.
        yarn: settings of YaRN, None without it.
    """

    theta: float
    max_length: int
    yarn: Any = None


@dataclass(frozen=True)
class Init:
    """Standard deviations of the initial weights.

    Args:
        std: of every matrix, DeepSeek-V3's 0.006 (report, section 4.2) unless the recipe says otherwise.
        output_std: of the matrices that write into the residual stream; None: `std`.
        embedding_std: of the embedding; None: `std`.
    """

    std: float
    output_std: float | None = None
    embedding_std: float | None = None


@dataclass(frozen=True)
class BuildContext:
    """The model around a component; a composite passes it on to its children.

    Args:
        dim: width D of the residual stream.
        vocabulary: entries V of the vocabulary.
        length: sequence length that costs are stated for.
        layer: index of the block, counted through the multi-token modules as checkpoints do.
        precision: makes every matrix-product layer.
        init: standard deviations of initial weights.
        rope: rotary positions.
        norm_eps: epsilon of every RMSNorm.
        seed: of the run; with a layer, a step and a token's number it is the address of a random choice.
        token_counts: how often each token stands in the training data, int64 V; None where no data is at hand.
        block: builds one more block of the last kind, for heads that own blocks.
        residual: the section of the residual stream between blocks.
        ropes: further rotary positions, by name.
        roles: the roles that matrix products of this model may have.
    """

    dim: int
    vocabulary: int
    length: int
    layer: int
    precision: Precision
    init: Init
    rope: Rope
    norm_eps: float
    seed: int = 0
    token_counts: Callable[[], Tensor] | None = None
    block: Callable[["BuildContext"], nn.Module] | None = None
    residual: Section | None = None
    ropes: Mapping[str, Rope] = field(default_factory=dict)
    roles: Collection[str] = frozenset(ROLES)

    def make(self, section: Section, **shared: Any) -> Any:
        """Build the component of a child section; `shared` is what its slot's contract adds."""
        made = section.component(section.config, self, **shared)
        made.label = section.name
        return made

    def stream(self, place: str) -> Any:
        """The residual of a `place`: `model`, `attention` or `ffn` (see `core.contracts.residual.Residual`)."""
        assert self.residual is not None
        return self.make(self.residual, place=place)

    def rope_named(self, name: str | None) -> Rope:
        """Rotary positions by name; None: the model's own.

        Raises:
            UserError: the recipe's `model.ropes` has no such name.
        """
        if name is None:
            return self.rope
        if name not in self.ropes:
            known = nearest(name, self.ropes) if self.ropes else "it is empty"
            raise UserError(f"model.ropes has no {name!r}; {known}")
        if self.ropes[name].max_length < self.rope.max_length:
            why = f"must be at least model.rope.max_length = {self.rope.max_length}"
            raise UserError(f"model.ropes.{name}.max_length = {self.ropes[name].max_length}: {why}")
        return self.ropes[name]

    def linear(self, inputs: int, outputs: int, role: str, *, residual: bool = False) -> nn.Module:
        """A matrix product made by the precision; `residual` marks those that write into the residual stream."""
        self._check_role(role)
        layer = self.precision.linear(inputs, outputs, role, std=self._std(residual))
        layer.role = role  # type: ignore[assignment]
        return layer

    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, residual: bool = False) -> nn.Module:
        """One matrix product for each expert, weight [E, out, in]."""
        self._check_role(role)
        layer = self.precision.grouped_linear(groups, inputs, outputs, role, std=self._std(residual))
        layer.role = role  # type: ignore[assignment]
        return layer

    def _check_role(self, role: str) -> None:
        where = "it is not in core.contracts.precision.ROLES, and no component of the recipe declares it"
        assert role in self.roles, f"unknown role {role!r}: {where}"

    def _std(self, residual: bool) -> float:
        return self.init.output_std if residual and self.init.output_std is not None else self.init.std
