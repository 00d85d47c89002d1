"""What a run writes about itself before its first step."""

from collections.abc import Callable
from typing import Any

import torch

from core.data.module import TextData
from core.recipe.compose import Recipe
from core.run.initial_weights import InitialWeights
from core.run.parent import Parent
from core.run.source_files import keep_source_files, run_at
from core.training.run_folder import RunFolder, provenance


def write_identity(
    recipe: Recipe,
    folder: RunFolder,
    data: TextData,
    taken: InitialWeights | None,
    parent: Parent | None,
    say: Callable[[str], None],
) -> None:
    """Writes provenance, tokenizer and recipe; the recipe last, because its presence makes the folder a run.

    Args:
        recipe: the run's recipe.
        folder: the run folder.
        data: its data, prepared.
        taken: what it takes from another run's weights; None: nothing.
        parent: the checkpoint that it continues; None: it begins by itself.
        say: prints notes.
    """
    rest: dict[str, Any] = {"data": data.fingerprint, "threads": torch.get_num_threads()}
    if taken is not None:
        rest["initial_weights"] = taken.record()
        rest |= keep_source_files(run_at(taken.source), folder, data.tokenizer, say)
    if parent is not None:
        rest["parent"] = parent.record()
        rest |= keep_source_files(parent.folder, folder, data.tokenizer, say)
    tokenizer = data.tokenizer
    file = recipe.data.tokenizer.file
    if file is not None and tokenizer is not None:
        rest["tokenizer"] = {"file": file, **tokenizer.record()}
    folder.write_json("provenance.json", provenance(recipe.sections(), **rest))
    if tokenizer is not None:
        folder.write_tokenizer(tokenizer, file)
    folder.write_plugin_files(recipe.plugins)
    if data.documents is not None:
        folder.write_text(folder.documents.name, data.documents)
    folder.write_digests()
    folder.write_recipe(recipe.to_dict())


def recorded_notices(folder: RunFolder) -> list[str]:
    """What the start of a run said about its initial weights, for the summary of one that continues it."""
    recorded = folder.read_provenance().get("initial_weights")
    notices = recorded.get("notices") if isinstance(recorded, dict) else None
    return [str(notice) for notice in notices] if isinstance(notices, list) else []
