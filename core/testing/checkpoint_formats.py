"""Checks of checkpoint formats: configuration and recipe describe the same model, and no tensor row is lost."""

import copy
from typing import Any

import torch
from torch import Tensor

from core.assemble import build
from core.contracts.checkpoint_format import CheckpointFormat, TensorMapping
from core.contracts.errors import ConfigError, UserError
from core.interop.accounting import check_ours, wanted
from core.interop.from_hf import import_ops
from core.interop.tensors import InMemoryTensors, TensorSpec
from core.interop.to_hf import export_ops
from core.interop.translation import composed
from core.recipe.compose import Recipe
from core.testing.clauses import check, require
from core.testing.subject import Subject

WHERE = "core/contracts/checkpoint_format.py, CheckpointFormat"


def _format(subject: Subject) -> CheckpointFormat:
    made: CheckpointFormat = subject.factory()
    return made


def _read(made: CheckpointFormat, config: dict[str, Any]) -> tuple[Recipe, list[TensorMapping]]:
    """The recipe of a configuration, and the mappings of its tensors in the layout that is written."""
    recipe = composed(made.recipe_of(config, [], "fp32").recipe, "its recipe_of")
    return recipe, list(made.tensor_mappings(config, recipe.to_dict(), None))


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model that a recipe builds."""
    return {name: tuple(t.shape) for name, t in build(recipe, device="meta").state_dict().items()}


@check(
    "checkpoint_format",
    clause="it names the architectures that it reads, and has an example of their configuration",
    where=f"{WHERE}: architectures, model_type, example_config",
)
def format_names_its_architectures(subject: Subject) -> None:
    """Requires that the example configuration names one of the architectures."""
    made = _format(subject)
    require(made.architectures and made.model_type, "architectures or model_type is empty")
    named = made.example_config.get("architectures")
    known = named and named[0] in made.architectures
    require(known, f"example_config has the architectures {named}")


@check(
    "checkpoint_format",
    clause="`recipe_of` gives a recipe that composes, and `config_of` a configuration that gives the same model again",
    where=WHERE,
)
def format_translates_both_ways(subject: Subject) -> None:
    """Translates the example to a recipe and back, twice; the example itself must not change."""
    made = _format(subject)
    before = copy.deepcopy(made.example_config)
    recipe, _ = _read(made, made.example_config)
    require(made.example_config == before, "recipe_of changed the configuration that it was given")
    config = made.config_of(recipe.to_dict())
    again, _ = _read(made, config)
    same_model = again.to_dict()["model"] == recipe.to_dict()["model"]
    require(same_model, "the model of config_of's configuration is another one")
    first_named = config.get("architectures") == [made.architectures[0]]
    require(first_named, "config_of does not write the first architecture")


@check(
    "checkpoint_format",
    clause="a model that the format cannot express, and a configuration without a required key, are a `ConfigError`",
    where=WHERE,
)
def format_refuses_with_a_reason(subject: Subject) -> None:
    """Tries an attention that the format cannot know, and the example without each of its keys."""
    made = _format(subject)
    recipe = _read(made, made.example_config)[0].to_dict()
    recipe["model"]["attention"] = {"name": "kit_attention"}
    try:
        made.config_of(recipe)
    except ConfigError:
        pass
    else:
        require(False, "config_of takes an attention that it cannot know")
    for key in made.example_config:
        rest = {name: value for name, value in made.example_config.items() if name != key}
        try:
            made.recipe_of(rest, [], "fp32")
        except ConfigError:
            continue


@check(
    "checkpoint_format",
    clause="`tensor_mappings` name each tensor of the format and each row of the model once; round trips keep bits",
    where=f"{WHERE}; core/contracts/checkpoint_format.py, TensorMapping",
)
def format_accounts_for_every_row(subject: Subject) -> None:
    """Compares the mappings with the model that the recipe builds, and moves random tensors in and out."""
    made = _format(subject)
    recipe, mappings = _read(made, made.example_config)
    try:
        check_ours(mappings, _shapes(recipe), "the format")
    except UserError as error:
        require(False, str(error))
    for mapping in mappings:
        if mapping.order is not None:
            rows = TensorSpec(torch.float32, mapping.shape).rows
            permutes = sorted(mapping.order) == list(range(rows))
            require(permutes, f"{mapping.theirs}: its order is not a permutation of its rows")
    _round_trip(recipe, mappings)


def _round_trip(recipe: Recipe, mappings: list[TensorMapping]) -> None:
    """Imports random tensors into the model's and exports them again, in memory."""
    draw = torch.Generator().manual_seed(0)
    theirs: dict[str, Tensor] = {}
    for mapping in mappings:
        if not mapping.copy and mapping.ours is not None:
            theirs[mapping.theirs] = torch.randn(mapping.shape, generator=draw)
    for mapping in mappings:
        if mapping.ours is None:
            theirs[mapping.theirs] = torch.zeros(mapping.shape)
    used = wanted(mappings, theirs)
    ours = _MemoryTarget(_shapes(recipe))
    for op in import_ops(used, InMemoryTensors(theirs), ours.specs, "the kit"):
        op.run(InMemoryTensors(theirs), ours)
    back = _MemoryTarget({name: tuple(tensor.shape) for name, tensor in theirs.items()})
    for op in export_ops(used, ours.specs, back.specs):
        op.run(InMemoryTensors(ours.tensors), back)
    for name, tensor in theirs.items():
        require(torch.equal(back.tensors[name], tensor), f"tensor {name} comes back changed")


class _MemoryTarget:
    """A target of fp32 tensors in memory, zeros at first."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            self.specs[name] = TensorSpec(torch.float32, shape)
            self.tensors[name] = torch.zeros(shape)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        spec = self.specs[name]
        self.tensors[name].view(spec.rows, spec.width)[first : first + len(rows)] = rows

    def sync(self) -> None:
        """Does nothing: memory has no disk to write to."""
