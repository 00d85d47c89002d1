"""The number of steps of a run, from its recipe's budget; the model's size turns FLOPs into tokens."""

from core.analysis.size import size_of
from core.assemble import build
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan


def plan_of(recipe: Recipe, model: LanguageModel | None = None) -> TrainingPlan:
    """The steps of the run; a budget in FLOPs needs the model's size.

    Args:
        recipe: its batch and its budget decide.
        model: the recipe's; None: it is built on the meta device if the budget is in FLOPs.
    """
    budget = recipe.budget
    tokens = budget.tokens
    if budget.flops is not None:
        size = size_of(model or build(recipe, device="meta"))
        tokens = max(1, round(budget.flops / size.flops_per_token))
    return TrainingPlan(
        sequences=recipe.batch.sequences,
        length=recipe.data.sequence_length,
        micro_batches=recipe.batch.accumulate,
        steps=budget.steps,
        tokens=tokens,
    )
