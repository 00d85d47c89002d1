"""The data that a recipe's run reads."""

from core.assemble import make
from core.data.module import TextData
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.training.ranks import rank_and_world


def text_data(recipe: Recipe, plan: TrainingPlan) -> TextData:
    """The training and validation data of a recipe; nothing is read before `prepare()`."""
    return TextData(
        make(recipe.data.corpus),
        vocab=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        plan=plan,
        seed=recipe.seed,
        rank_and_world=rank_and_world,
        validation_sequences=recipe.validation.sequences,
    )
