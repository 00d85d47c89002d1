"""Inspects a run: loads it, reads the text with it, and makes the document."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contracts.errors import NotFiniteError, UserError
from core.generation.run_tokenizer import RunTokenizer
from core.inspection.counts import Counts
from core.inspection.document import Sizes, Strings, document, moved
from core.inspection.texts import Text, held_out, of_file
from core.interop.run_weights import check_average
from core.model.trace import trace_context
from core.recipe.compose import Recipe, compose_run
from core.run.device import check_device
from core.run.loading import load, run_of
from core.training.early_checks import check_trained
from core.training.resume import newest_checkpoint
from core.training.run_folder import RunFolder


@dataclass(frozen=True)
class Options:
    """What to read, and how.

    Args:
        text: the file to read; None: the run's held-out documents.
        beside: a run or checkpoint to compare with.
        tokens: the number of tokens at which the reading stops.
        device: where the model runs.
        weights: the name of averaged weights; None: those that were trained.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
    """

    text: Path | None = None
    beside: Path | None = None
    tokens: int = 200_000
    device: str = "cpu"
    weights: str | None = None
    trust: bool = False


@dataclass(frozen=True)
class Inspection:
    """The result: the run's folder and the JSON document."""

    folder: Path
    document: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """A checkpoint that was checked and not loaded yet."""

    checkpoint: Path
    folder: RunFolder
    recipe: Recipe
    tokenizer: RunTokenizer


def inspect(
    run: Path,
    options: Options,
    *,
    sizes: Sizes | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Inspection:
    """Inspects a run; mistakes are found before a model is loaded.

    Raises:
        UserError: no run, no tokenizer, no text, or two runs that do not read the same tokens.
        NotFiniteError: a weight that is not finite.
    """
    sizes = sizes or Sizes()
    source = _source(run, options, say)
    other = None
    if options.beside is not None:
        other = _source(options.beside, options, say)
        _check_same_tokens(source, other, options.beside)
    text = _text(source, options)
    counts = _count(source, text, options)
    strings = Strings(source.tokenizer)
    described = {"name": text.name}
    result = _document(source, described, counts, strings, sizes)
    if other is not None:
        second = _count(other, text, options)
        result["beside"] = _document(other, described, second, strings, sizes)
        result["moved"] = moved(counts, second)
    return Inspection(source.folder.path, result)


def _source(run: Path, options: Options, say: Callable[[str], None]) -> _Source:
    """Finds and checks what a run is made of."""
    checkpoint = newest_checkpoint(run)
    folder = run_of(checkpoint)
    if options.weights is not None:
        check_average(checkpoint, options.weights)
    if options.text is None:
        check_trained(folder, "give a text by --text")
    recipe = compose_run(folder.recipe, trust=options.trust, check_source=options.text is None)
    for notice in recipe.notices():
        say(f"note: {notice}")
    check_device(options.device, recipe)
    return _Source(checkpoint, folder, recipe, RunTokenizer.of(folder))


def _check_same_tokens(source: _Source, other: _Source, beside: Path) -> None:
    """Raises `UserError` unless both runs have one tokenizer."""
    if source.tokenizer.tokenizer.to_json() != other.tokenizer.tokenizer.to_json():
        raise UserError(
            f"--beside {beside}: has another tokenizer than {source.folder.path}; both must read the same tokens"
        )
    length = source.recipe.data.sequence_length
    longest = other.recipe.model.rope.max_length
    if length > longest:
        raise UserError(
            f"--beside {beside}: model.rope.max_length = {longest}: must be at least {length}, the "
            f"sequence length of {source.folder.path}"
        )


def _text(source: _Source, options: Options) -> Text:
    """The tokens to read."""
    recipe = source.recipe
    if options.text is None:
        return held_out(recipe, source.folder, options.tokens)
    length = min(recipe.data.sequence_length, recipe.model.rope.max_length, 4096)
    vocabulary = recipe.data.tokenizer.vocab
    return of_file(options.text, source.tokenizer, length, vocabulary, options.tokens)


def _count(source: _Source, text: Text, options: Options) -> Counts:
    """Reads the text with a model."""
    model = load(source.checkpoint, trust=options.trust, weights=options.weights)
    model = model.to(options.device)
    counts = Counts(model.embedding.weight.shape[0], text.sources)
    try:
        for context in text.on(options.device):
            counts.add(trace_context(model, context))
    except NotFiniteError as cause:
        raise NotFiniteError(f"{source.checkpoint}: {cause}") from cause
    return counts


def _document(
    source: _Source, text: dict[str, Any], counts: Counts, strings: Strings, sizes: Sizes
) -> dict[str, Any]:
    name = source.folder.path.resolve().name
    return document(name, source.checkpoint.name, text, counts, strings, sizes)
