"""The contract of checkpoint formats: a configuration and a recipe that mean the same, and pieces that add up."""

import copy
from typing import Any

import torch
from torch import Tensor

from core.assemble import build
from core.contracts.checkpoint_format import CheckpointFormat, Piece
from core.contracts.errors import UserError, Wrong
from core.interop.accounting import check_ours, wanted
from core.interop.from_hf import composed, moves_in
from core.interop.tensors import Kind, Loaded
from core.interop.to_hf import moves_out
from core.recipe.compose import Recipe
from core.testing.clauses import check, hold
from core.testing.subject import Subject

WHERE = "core/contracts/checkpoint_format.py, CheckpointFormat"


def _format(subject: Subject) -> CheckpointFormat:
    made: CheckpointFormat = subject.factory()
    return made


def _read(made: CheckpointFormat, config: dict[str, Any]) -> tuple[Recipe, list[Piece]]:
    """The recipe of a configuration, and its pieces in the layout that is written."""
    recipe = composed(made.recipe_of(config, [], "fp32").recipe, "its recipe_of")
    return recipe, list(made.pieces(config, recipe.to_dict(), None))


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in build(recipe, device="meta").state_dict().items()}


@check(
    "checkpoint_format",
    clause="it says which architectures it reads, and has an example of a configuration of theirs",
    where=f"{WHERE}: architectures, model_type, example_config",
)
def format_names_its_architectures(subject: Subject) -> None:
    """The example names one of them."""
    made = _format(subject)
    hold(made.architectures and made.model_type, "architectures or model_type is empty")
    named = made.example_config.get("architectures")
    hold(named and named[0] in made.architectures, f"example_config has the architectures {named}")


@check(
    "checkpoint_format",
    clause="`recipe_of` gives a recipe that composes, and `config_of` a configuration that gives the same model again",
    where=WHERE,
)
def format_translates_both_ways(subject: Subject) -> None:
    """From the example, and without changing it."""
    made = _format(subject)
    before = copy.deepcopy(made.example_config)
    recipe, _ = _read(made, made.example_config)
    hold(made.example_config == before, "recipe_of changed the configuration that it was given")
    config = made.config_of(recipe.to_dict())
    again, _ = _read(made, config)
    hold(again.to_dict()["model"] == recipe.to_dict()["model"], "the model of config_of's configuration is another one")
    hold(config.get("architectures") == [made.architectures[0]], "config_of does not write the first architecture")


@check(
    "checkpoint_format",
    clause="a model that theirs cannot express is refused with `Wrong`, and a configuration that has lost a key too",
    where=WHERE,
)
def format_refuses_with_a_reason(subject: Subject) -> None:
    """An attention that nobody knows; one required key of theirs after the other."""
    made = _format(subject)
    recipe = _read(made, made.example_config)[0].to_dict()
    recipe["model"]["attention"] = {"name": "kit_attention"}
    try:
        made.config_of(recipe)
    except Wrong:
        pass
    else:
        hold(False, "config_of takes an attention that it cannot know")
    for key in made.example_config:
        rest = {k: v for k, v in made.example_config.items() if k != key}
        try:
            made.recipe_of(rest, [], "fp32")
        except Wrong:
            continue


@check(
    "checkpoint_format",
    clause="pieces name every tensor of theirs once and every row of ours once, so tensors that go in come back",
    where=f"{WHERE}; core/contracts/checkpoint_format.py, Piece",
)
def format_accounts_for_every_row(subject: Subject) -> None:
    """Held against the model that the recipe builds."""
    made = _format(subject)
    recipe, pieces = _read(made, made.example_config)
    try:
        check_ours(pieces, _shapes(recipe), "the format")
    except UserError as told:
        hold(False, str(told))
    for piece in pieces:
        rows = Kind(torch.float32, piece.shape).rows
        hold(piece.order is None or sorted(piece.order) == list(range(rows)), f"{piece.theirs}: its order is none")
    _round_trip(recipe, pieces)


def _round_trip(recipe: Recipe, pieces: list[Piece]) -> None:
    """Random numbers into the model's tensors and back, in memory."""
    draw = torch.Generator().manual_seed(0)
    main = {p.theirs: torch.randn(p.shape, generator=draw) for p in pieces if not p.copy and p.ours is not None}
    theirs = {**main, **{p.theirs: torch.zeros(p.shape) for p in pieces if p.ours is None}}
    held = wanted(pieces, theirs)
    ours = _Kept({name: Kind(torch.float32, shape) for name, shape in _shapes(recipe).items()})
    for move in moves_in(held, Loaded(theirs), ours.kinds, "the kit"):
        move.run(Loaded(theirs), ours)
    back = _Kept({name: Kind(torch.float32, tuple(t.shape)) for name, t in theirs.items()})
    for move in moves_out(held, ours.kinds, back.kinds):
        move.run(Loaded(ours.tensors), back)
    for name, tensor in theirs.items():
        hold(torch.equal(back.tensors[name], tensor), f"tensor {name} comes back changed")


class _Kept:
    """A target in memory, of zeros at first."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self.tensors: dict[str, Tensor] = {n: torch.zeros(kind.shape, dtype=kind.dtype) for n, kind in kinds.items()}

    def write(self, name: str, first: int, rows: Tensor) -> None:
        kind = self.kinds[name]
        self.tensors[name].view(kind.rows, kind.width)[first : first + len(rows)] = rows

    def sync(self) -> None:
        """Nothing to force."""
