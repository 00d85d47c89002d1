"""The validation loss of a trained model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.assemble import make
from core.contracts.errors import NotFiniteError, UserError
from core.data.baseline import xz_bits_per_byte
from core.data.loaders import ValidationLoader
from core.interop.run_weights import check_average
from core.model.language_model import LanguageModel
from core.recipe.compose import compose_run
from core.run.data import text_data
from core.run.loading import load, run_of
from core.run.summary import finite
from core.training.early_checks import check_trained
from core.training.module import TrainingModule


@torch.no_grad()
def evaluate(
    checkpoint: Path,
    *,
    xz: bool = False,
    trust: bool = False,
    weights: str | None = None,
    say: Callable[[str], None] = print,
    prepare: Callable[[LanguageModel], object] = lambda _: None,
    dispatcher: str | None = None,
) -> dict[str, Any]:
    """Validates a checkpoint over its recipe's whole validation split.

    Args:
        checkpoint: the checkpoint.
        xz: also measure what `xz -9e` needs for the same bytes when it has the training text before them.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
        weights: the name of averaged weights; None: those that were trained.
        say: prints the caveats that belong to the values.
        prepare: is called with the model before it reads anything; it may place the experts, for example. Where ranks
            form a process group, each reads its share of every batch, and values are those of all ranks.
        dispatcher: the name of a dispatcher in the place of those of the recipe.

    Returns:
        The values of `ValidationTotals.compute`, with `checkpoint`, `notices` and, if requested, `weights` and
        `xz_bits_per_byte`.

    Raises:
        UserError: no run, a damaged checkpoint, no such average, data that differs from the run's, or no validation
            split.
        NotFiniteError: a weight or a loss is not finite.
    """
    folder = run_of(checkpoint)
    check_trained(folder, "score it with --tasks")
    if weights is not None:
        check_average(checkpoint, weights)
    recipe = compose_run(folder.recipe, trust=trust, check_source=True)
    for notice in recipe.notices():
        say(f"note: {notice}")
    data = text_data(recipe, plan_of(recipe), folder)
    data.prepare()
    is_text = not data.tokens_only
    if not data.validation_documents:
        how = "--text FILE scores another text, and data.validation or data.validation_fraction hold some out"
        raise UserError(f"{checkpoint}: the run has held out nothing to validate on; {how}")
    if xz and not is_text:
        raise UserError(
            f"--xz: corpus {recipe.data.corpus.name} has tokens and no text, and xz needs text"
        )
    model = load(checkpoint, trust=trust, weights=weights, dispatcher=dispatcher)
    prepare(model)
    module = TrainingModule(
        model,
        plan=data.plan,
        optimizer=make(recipe.optimizer),
        strategy=make(recipe.strategy),
        flops_per_token=0.0,
        mask_documents=recipe.data.mask_documents,
        validation_bytes=data.validation_bytes,
        source_bytes=data.source_bytes,
    ).eval()
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationLoader)
    for index, batch in enumerate(loader):
        module.validation_step(batch, index)
    measured = module.validation.compute()
    losses = ["val_loss", *(f"val/{term.label}" for term in module.ledger.heads)]
    _check_losses(measured, losses, checkpoint)
    values: dict[str, Any] = {"checkpoint": checkpoint.name, **measured}
    if weights is not None:
        values["weights"] = weights
    values["notices"] = recipe.notices()
    if xz:
        train, validation = data.read_text()
        values["xz_bits_per_byte"] = xz_bits_per_byte(train, validation)
    return finite(values)


def _check_losses(values: dict[str, float], names: list[str], checkpoint: Path) -> None:
    """Raises `NotFiniteError` for the first loss that is NaN or infinite; a component's metrics may be."""
    for name in names:
        value = values.get(name, 0.0)
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{checkpoint}: {name} = {value} over the validation split: the model has no score"
            )
