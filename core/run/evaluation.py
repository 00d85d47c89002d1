"""The validation loss of a trained model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.assemble import make
from core.contracts.corpus import TokenCorpus
from core.contracts.errors import UserError
from core.data.baseline import xz_bits_per_byte
from core.data.documents import read_split
from core.data.loaders import ValidationLoader
from core.recipe.compose import compose
from core.run.data import text_data
from core.run.loading import load, run_of
from core.run.summary import finite
from core.training.module import TrainingModule
from core.training.resume import check_trained


@torch.no_grad()
def evaluate(
    checkpoint: Path, *, xz: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Validates a checkpoint over its recipe's whole validation split.

    Args:
        checkpoint: the checkpoint file.
        xz: also measure what `xz -9e` needs for the same bytes when it has the training text before them.
        say: prints the caveats that belong to the values.

    Returns:
        The values of `ValidationTotals.compute`, with `checkpoint`, `notices` and, if requested, `xz_bits_per_byte`.

    Raises:
        UserError: no run, a damaged checkpoint, data that differs from the run's, or no validation split.
    """
    folder = run_of(checkpoint)
    check_trained(folder, "score it with --tasks")
    recipe = compose(folder.recipe)
    for notice in recipe.notices():
        say(f"note: {notice}")
    data = text_data(recipe, plan_of(recipe), folder)
    data.prepare()
    corpus = make(recipe.data.corpus)
    if not data.validation_documents:
        why = "" if isinstance(corpus, TokenCorpus) else " (fewer than 11 documents)"
        raise UserError(f"{checkpoint}: the corpus has no validation split{why}")
    if xz and isinstance(corpus, TokenCorpus):
        raise UserError(
            f"--xz: corpus {recipe.data.corpus.name} has tokens and no text, and xz needs text"
        )
    module = TrainingModule(
        load(checkpoint),
        plan=data.plan,
        optimizer=make(recipe.optimizer),
        flops_per_token=0.0,
        mask_documents=recipe.data.mask_documents,
        validation_bytes=data.validation_bytes,
    ).eval()
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationLoader)
    for index, batch in enumerate(loader):
        module.validation_step(batch, index)
    values: dict[str, Any] = {"checkpoint": checkpoint.name, **module.validation.compute()}
    values["notices"] = recipe.notices()
    if xz:
        split = read_split(corpus)
        train = b"".join(document.data for document in split.train)
        validation = b"".join(document.data for document in split.validation)
        values["xz_bits_per_byte"] = xz_bits_per_byte(train, validation)
    return finite(values)
