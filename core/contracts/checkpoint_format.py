"""The checkpoint_format slot: how another program lays a model out in its files.

A format knows names, shapes and the configuration file, and moves no bytes: `core.interop` asks it for pieces and
streams them. So a format of a thousand tensors is a page of names, and a checkpoint of a terabyte needs no more
memory than one of its tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.contracts.component import Component


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs, and the rows of ours that hold the same numbers.

    Rows: every dimension but the last counts them, so [E, 2H, D] has E x 2H rows; a vector is one row.

    Args:
        theirs: the tensor's name in their files.
        shape: its shape there.
        ours: the name in our model's state; None for a constant that we do not keep, which is 0.
        first: the first row of `ours` that it fills; it fills as many as it has.
        order: row i of those is their row order[i]; None: they stand in the same order.
        exact: stays fp32 or wider whatever number format is asked for.
        blocks: a matrix that the FP8 form of the format quantises in blocks.
        copy: another piece owns these rows of ours; theirs must hold the same numbers.
        optional: files without it are whole too.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str | None
    first: int = 0
    order: tuple[int, ...] | None = None
    exact: bool = False
    blocks: bool = False
    copy: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Translation:
    """Their configuration in our words.

    Args:
        recipe: a raw recipe that composes.
        notices: what nobody who uses it may overlook, a sentence each.
    """

    recipe: dict[str, Any]
    notices: tuple[str, ...] = ()


class CheckpointFormat(Component, ABC):
    """Maps one family of checkpoints to recipes and back; made from its `Config` alone. Must not import torch.

    What cannot be mapped is refused with `Wrong(key, why)`: `recipe_of` names a key of their configuration,
    `config_of` a key path of the recipe. Nothing is left out silently: a setting that would change one logit is
    translated or refused.

    `architectures` are the names in their configuration that this format reads, the first of them the one that it
    writes; `model_type` stands in where a configuration names no architecture. `example_config` is a small
    configuration for the conformance kit. `fp8_config` is what their configuration says of FP8 blocks, None where
    the format has none.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    model_type: ClassVar[str] = ""
    example_config: ClassVar[dict[str, Any]] = {}
    fp8_config: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def recipe_of(self, config: Mapping[str, Any], names: Collection[str], precision: str) -> Translation:
        """The recipe whose model computes what theirs does.

        Args:
            config: their configuration file.
            names: the tensors of their files: some parts are there or not whatever the configuration says.
            precision: the precision that suits their number formats: fp32, fp64 or bf16.
        """

    @abstractmethod
    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Their configuration for a resolved recipe (`Recipe.to_dict()`); number formats and markers are added."""

    @abstractmethod
    def pieces(
        self, config: Mapping[str, Any], recipe: Mapping[str, Any], names: Collection[str] | None
    ) -> Iterator[Piece]:
        """Every tensor of theirs once, and every row of ours once (copies apart).

        Args:
            config: their configuration.
            recipe: ours, resolved: the one that `recipe_of` gave, or the one that gave `config`.
            names: the tensors of the files where there are some: a format may have several layouts. None: the layout
                that other programs expect, without FP8 scales.
        """

    def ignores(self, name: str) -> bool:
        """Whether a tensor of theirs holds nothing that was learned (a table that can be computed)."""
        return False
