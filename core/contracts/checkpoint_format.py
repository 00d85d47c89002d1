"""The checkpoint_format slot: how another program lays a model out in its files.

A format knows names, shapes and the configuration file, and moves no bytes: it names the tensor of theirs that belongs
to each tensor of ours, and `core.interop` streams the data. So a format of a thousand tensors is a page of names, and
a checkpoint of a terabyte needs no more memory than one of its tensors. *Theirs* is what the other program's files
hold, *ours* is the state of a model built from a recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.contracts.component import Component


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of theirs, and the rows of ours that hold the same numbers.

    All dimensions but the last together count the rows, so [E, 2H, D] has E x 2H rows; a vector is one row.

    Args:
        theirs: the tensor's name in their files.
        shape: its shape there.
        ours: the name in our model's state; None for a constant that we do not keep, which is 0.
        first: the first row of `ours` that it fills; it fills as many as it has.
        order: row i of the filled rows is row order[i] of theirs; None: both have the same order.
        exact: whether it stays fp32 or wider whatever number format is requested.
        blocks: whether the FP8 form of the format quantises this matrix in blocks.
        copy: whether another mapping owns these rows of ours; theirs must hold the same numbers.
        optional: whether files without it are complete too.
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
    """Their configuration as a recipe.

    Args:
        recipe: a recipe as plain containers, from which `compose` makes a valid one.
        notices: caveats for everybody who uses the model, one sentence each.
    """

    recipe: dict[str, Any]
    notices: tuple[str, ...] = ()


class CheckpointFormat(Component, ABC):
    """Maps one family of checkpoints to recipes and back; made from its `Config` alone. It must not import torch.

    What cannot be mapped raises `ConfigError(key, why)`: `recipe_of` names a key of their configuration,
    `config_of` a key path of the recipe. Nothing is left out silently: a setting that would change one logit is
    translated or an error.

    Class attributes:
        architectures: the names in their configuration that this format reads; it writes the first of them.
        model_type: identifies a configuration that names no architecture.
        other_model_types: model types of other models with the same architecture, which identify one too.
        example_config: a small configuration for the conformance kit.
        fp8_config: what their configuration says about FP8 blocks; None where the format has none.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    model_type: ClassVar[str] = ""
    other_model_types: ClassVar[tuple[str, ...]] = ()
    example_config: ClassVar[dict[str, Any]] = {}
    fp8_config: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def recipe_of(
        self, config: Mapping[str, Any], names: Collection[str] | None, precision: str
    ) -> Translation:
        """Returns the recipe whose model computes what theirs does.

        Args:
            config: their configuration file.
            names: the tensors of their files, because a configuration does not say whether some parts are present.
                None if there is only a configuration: every part that it mentions is then present.
            precision: the precision that suits their number formats: fp32, fp64 or bf16.
        """

    @abstractmethod
    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Returns their configuration for a resolved recipe (`Recipe.to_dict()`).

        Number formats and the ids of marker tokens are added to it afterwards.
        """

    @abstractmethod
    def tensor_mappings(
        self, config: Mapping[str, Any], recipe: Mapping[str, Any], names: Collection[str] | None
    ) -> Iterator[TensorMapping]:
        """Yields every tensor of theirs once, and with them every row of ours once (copies apart).

        Args:
            config: their configuration.
            recipe: ours, resolved: the one that `recipe_of` gave, or the one that gave `config`.
            names: the tensors of the files if there are some: a format may have several layouts. None: the layout
                that other programs expect, without FP8 scales.
        """

    def ignores(self, name: str) -> bool:
        """Whether a tensor of theirs holds nothing that was learned (a table that can be computed)."""
        return False
