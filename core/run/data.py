"""The data that a recipe's run reads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from core.assemble import make
from core.contracts.errors import ConfigError, UserError
from core.data.fim import FillInTheMiddle
from core.data.held_out import HeldOut
from core.data.module import TextData
from core.data.recorded import RecordedData
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_file import load_tokenizer_file
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.recipe.values import show_value
from core.training.early_checks import check_corpus
from core.training.ranks import rank_and_world
from core.training.run_folder import RunFolder


def text_data(recipe: Recipe, plan: TrainingPlan, run: RunFolder | None = None) -> TextData:
    """The training and validation data of a recipe; nothing is read before `prepare()`.

    Args:
        recipe: its data section decides.
        plan: the recipe's steps.
        run: the folder of a run that was started on this data; None: a new run.

    Raises:
        UserError: the recipe has no corpus.
    """
    check_corpus(recipe)
    recorded = None if run is None else run.recorded_data()
    given: Callable[[], Tokenizer] | None = None
    if recorded is not None and recorded.is_from_file:
        given = partial(_own_tokenizer, recorded)
    elif recorded is None and recipe.data.tokenizer.file is not None:
        given = partial(tokenizer_of, recipe)
    return TextData(
        make(recipe.data.corpus),
        vocab=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        plan=plan,
        seed=recipe.seed,
        rank_and_world=rank_and_world,
        validation_sequences=recipe.validation.sequences,
        recorded=recorded,
        held_out=held_out(recipe),
        tokenizer=given,
        packing=recipe.data.packing,
        fim=fill_in_the_middle(recipe),
    )


def _own_tokenizer(recorded: RecordedData) -> Tokenizer:
    """The tokenizer in a run's folder; raises `UserError` where its file is missing."""
    if recorded.tokenizer is None:
        raise UserError(f"{recorded.folder / 'tokenizer.json'}: there is no such file")
    return recorded.tokenizer


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The tokenizer that a recipe names.

    Raises:
        UserError: its file cannot be read, or has more entries than the model.
    """
    section = recipe.data.tokenizer
    assert section.file is not None
    try:
        tokenizer = load_tokenizer_file(
            Path(section.file), pattern=section.pattern, begin=section.begin, end=section.end
        )
        if tokenizer.last >= section.vocab:
            why = f"must be at least {tokenizer.last + 1}, which {section.file} has"
            raise ConfigError("vocab", why)
    except ConfigError as error:
        value = show_value(getattr(section, error.key))
        key = f"data.tokenizer.{error.key}"
        raise UserError(f"{recipe.source}: {key} = {value}: {error.why}") from error
    return tokenizer


def fill_in_the_middle(recipe: Recipe) -> FillInTheMiddle | None:
    """How a recipe's training documents are rearranged; None: not at all."""
    section = recipe.data.fim
    return None if section is None else FillInTheMiddle(section.rate, tuple(section.tokens))


def held_out(recipe: Recipe) -> HeldOut:
    """How a recipe chooses its validation text."""
    validation = recipe.data.validation
    corpus = None if validation is None else make(validation)
    return HeldOut(recipe.data.validation_fraction, corpus)
