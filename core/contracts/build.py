"""What a component learns about the model around it when it is built."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from core.contracts.errors import ConfigError, SectionError, UserError, nearest
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
        std: the one of every matrix, DeepSeek-V3's 0.006 (report, section 4.2) unless the recipe says otherwise.
        output_std: the one of the matrices that write into the residual stream; None: `std`.
        embedding_std: the one of the embedding; None: `std`.
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
        layer: index of the block; multi-token modules continue the count, as in checkpoints.
        precision: makes every matrix-product layer.
        init: standard deviations of initial weights.
        rope: rotary positions.
        norm_eps: epsilon of every RMSNorm.
        seed: the run's seed; with a layer, a step and a token's number it is the address of a random choice.
        token_counts: returns how often each token occurs in the training data, int64 V; None if no data is at hand.
        block: builds one more block of the last kind, for heads that own blocks.
        residual: the recipe section of the residual stream between blocks.
        ropes: further rotary positions, by name.
        roles: the roles that matrix products of this model may have.
        dispatcher: the section of the dispatcher that is built in the place of every other one; None: none is
            replaced.
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
    dispatcher: Section | None = None

    def make(self, section: Section, **shared: Any) -> Any:
        """Builds the component of a child section.

        Args:
            section: the value of a `child` key of the `Config`.
            shared: keyword arguments that the slot's contract adds, `experts` of a router for example.

        Raises:
            SectionError: the constructor raised `ConfigError` for a key that does not fit the model around it.
        """
        if section.slot == "dispatcher" and self.dispatcher is not None:
            section = self.dispatcher
        try:
            made = section.component(section.config, self, **shared)
        except ConfigError as error:
            raise SectionError(section, error) from error
        made.label = section.name
        return made

    def stream(self, place: str) -> Any:
        """Builds the residual of a `place`: `model`, `attention` or `ffn` (see `core.contracts.residual.Residual`)."""
        assert self.residual is not None
        return self.make(self.residual, place=place)

    def rope_named(self, name: str | None) -> Rope:
        """The rotary positions of a name; None: the model's own.

        Raises:
            UserError: the recipe's `model.ropes` has no such name.
        """
        if name is None:
            return self.rope
        if name not in self.ropes:
            known = nearest(name, self.ropes) if self.ropes else "it is empty"
            raise UserError(f"model.ropes has no {name!r}; {known}")
        rope = self.ropes[name]
        if rope.max_length < self.rope.max_length:
            why = f"must be at least model.rope.max_length = {self.rope.max_length}"
            raise UserError(f"model.ropes.{name}.max_length = {rope.max_length}: {why}")
        return rope

    def linear(self, inputs: int, outputs: int, role: str, *, residual: bool = False) -> nn.Module:
        """Makes a matrix-product layer in the recipe's precision: `(..., inputs) -> (..., outputs)`, without bias.

        Args:
            inputs: width of the input.
            outputs: width of the output.
            role: what the layer is for, one of `core.contracts.precision.ROLES` or of the component's `roles`.
            residual: whether it writes into the residual stream; its weight is then drawn with `init.output_std`.
        """
        self._check_role(role)
        layer = self.precision.linear(inputs, outputs, role, std=self._std(residual))
        layer.role = role  # type: ignore[assignment]
        return layer

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, residual: bool = False
    ) -> nn.Module:
        """Makes one matrix product for each expert, with weight [E, out, in]; arguments as for `linear`."""
        self._check_role(role)
        std = self._std(residual)
        layer = self.precision.grouped_linear(groups, inputs, outputs, role, std=std)
        layer.role = role  # type: ignore[assignment]
        return layer

    def _check_role(self, role: str) -> None:
        where = "it is not in core.contracts.precision.ROLES, and no component of the recipe declares it"
        assert role in self.roles, f"unknown role {role!r}: {where}"

    def _std(self, residual: bool) -> float:
        if residual and self.init.output_std is not None:
            return self.init.output_std
        return self.init.std
