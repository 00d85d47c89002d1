"""`trainer:` against the real `lightning.Trainer`: every key is free, or owned by another key of the recipe."""

import inspect
from dataclasses import fields

import pytest

from core.recipe.recipe_schema import RecipeSchema
from core.recipe.trainer_keys import FREE_TRAINER_KEYS, OWNED_TRAINER_KEYS
from moeloom.commands import command_names

KEYS = {f.name for f in fields(RecipeSchema)}


def test_every_key_of_the_trainer_is_free_or_owned_and_none_is_invented() -> None:
    from lightning import Trainer

    real = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert real == set(OWNED_TRAINER_KEYS) | FREE_TRAINER_KEYS
    assert not set(OWNED_TRAINER_KEYS) & FREE_TRAINER_KEYS


@pytest.mark.parametrize(("key", "owner"), OWNED_TRAINER_KEYS.items())
def test_the_owner_of_a_trainer_key_exists(key: str, owner: str) -> None:
    if owner.startswith("--"):
        assert owner in ("--out", "--dry-run")
    elif owner.startswith("the command "):
        assert owner.removeprefix("the command ") in command_names()
    else:
        section, _, inner = owner.partition(".")
        assert section in KEYS
        if inner:
            assert inner in RecipeSchema.__dataclass_fields__[section].type.__dataclass_fields__  # type: ignore[union-attr]
