"""The data that a recipe's run reads."""

from core.assemble import make
from core.data.fim import FillInTheMiddle
from core.data.held_out import HeldOut
from core.data.module import TextData
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.training.ranks import rank_and_world
from core.training.run_folder import RunFolder


def text_data(recipe: Recipe, plan: TrainingPlan, run: RunFolder | None = None) -> TextData:
    """The training and validation data of a recipe; nothing is read before `prepare()`.

    Args:
        recipe: its data section decides.
        plan: the recipe's steps.
        run: the folder of a run that was started on this data; None: a new run.
    """
    return TextData(
        make(recipe.data.corpus),
        vocab=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        plan=plan,
        seed=recipe.seed,
        rank_and_world=rank_and_world,
        validation_sequences=recipe.validation.sequences,
        recorded=None if run is None else run.recorded_data(),
        held_out=held_out(recipe),
        packing=recipe.data.packing,
        fim=fill_in_the_middle(recipe),
    )


def fill_in_the_middle(recipe: Recipe) -> FillInTheMiddle | None:
    """How a recipe's training documents are rearranged; None: not at all."""
    section = recipe.data.fim
    return None if section is None else FillInTheMiddle(section.rate, tuple(section.tokens))


def held_out(recipe: Recipe) -> HeldOut:
    """How a recipe chooses its validation text."""
    validation = recipe.data.validation
    corpus = None if validation is None else make(validation)
    return HeldOut(recipe.data.validation_fraction, corpus)
