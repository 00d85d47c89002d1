"""The tokens to inspect: the held-out documents of a run, as its validation reads them, or a file."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.analysis.budget import plan_of
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.data.loaders import ValidationLoader
from core.generation.run_tokenizer import RunTokenizer
from core.harness.own_text import read_own_text
from core.recipe.compose import Recipe
from core.run.data import text_data
from core.training.run_folder import RunFolder

TENSORS = ("tokens_BL", "positions_BL", "targets_BL", "valid_BL", "documents_BM", "source_B")
"""The fields of a context that are set here."""


@dataclass(frozen=True)
class Text:
    """Tokens as micro-batches.

    Args:
        name: what they are, for a reader.
        contexts: the micro-batches, with targets.
        sources: the names of their sources.
    """

    name: str
    contexts: list[SequenceContext]
    sources: tuple[str, ...] = ("text",)

    def on(self, device: str) -> Iterator[SequenceContext]:
        """The micro-batches on a device."""
        for context in self.contexts:
            moved: dict[str, Any] = {}
            for key in TENSORS:
                value = getattr(context, key)
                moved[key] = None if value is None else value.to(device)
            yield replace(context, **moved)


def held_out(recipe: Recipe, folder: RunFolder, limit: int) -> Text:
    """The validation split of a run, in the micro-batches in which `core.evaluate` reads it.

    Args:
        recipe: the run's recipe.
        folder: the run's folder.
        limit: the number of tokens at which the reading stops, at the end of a micro-batch.

    Raises:
        UserError: the data cannot be read, or there is no validation split.
    """
    data = text_data(recipe, plan_of(recipe), folder)
    data.prepare()
    if not data.validation_documents:
        raise UserError(f"{folder.path}: the corpus has no validation split; give a text by --text")
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationLoader)
    sources = tuple(data.source_bytes) or ("text",)
    contexts = []
    tokens = 0
    for index, batch in enumerate(loader):
        context = SequenceContext.of(
            batch.tokens_BL,
            targets_BL=batch.targets_BL,
            valid_BL=batch.valid_BL,
            documents_BM=batch.documents_BM if recipe.data.mask_documents else None,
            source_B=batch.source_B,
            first_sequence=index * len(batch.tokens_BL),
        )
        contexts.append(context)
        tokens += int(batch.valid_BL.sum())
        if tokens >= limit:
            break
    return Text("held-out documents", contexts, sources)


def of_file(
    file: Path, tokenizer: RunTokenizer, length: int, vocabulary: int, limit: int, rows: int = 8
) -> Text:
    """A file of text or token ids, in sequences of `length` tokens, of which the first begins with the marker.

    Raises:
        UserError: it cannot be read, is empty, or has a token that the model does not know.
    """
    content = read_own_text(file)
    ids = tokenizer.tokenizer.encode(content) if isinstance(content, str) else list(content)
    ids = [tokenizer.markers.begin, *ids][:limit]
    if max(ids) >= vocabulary:
        raise UserError(
            f"--text {file}: needs token {max(ids)}, and the model knows {vocabulary}, from 0"
        )
    length = min(length, max(len(ids), 8))
    padded = -(-len(ids) // length) * length
    stream = torch.zeros(padded + 1, dtype=torch.int64)
    stream[: len(ids)] = torch.tensor(ids)
    valid = torch.arange(padded) < len(ids)
    tokens_NL = stream[:-1].view(-1, length)
    targets_NL = stream[1:].view(-1, length)
    valid_NL = valid.view(-1, length)
    contexts = []
    for start in range(0, len(tokens_NL), rows):
        part = slice(start, start + rows)
        contexts.append(
            SequenceContext.of(
                tokens_NL[part],
                targets_BL=targets_NL[part],
                valid_BL=valid_NL[part],
                first_sequence=start,
            )
        )
    return Text(file.name, contexts)
