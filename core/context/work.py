"""Measures how a run reads long texts: checks what is asked, loads the model, and makes the JSON document."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from core.analysis.budget import plan_of
from core.assemble import build
from core.context.needle import AFTER, BEFORE, NeedleScore, needles, other_tokens, score_needles
from core.context.positions import PositionLoss, loss_by_position
from core.contracts.context import SequenceContext
from core.contracts.errors import NotFiniteError, UserError
from core.data.loaders import ValidationLoader
from core.data.module import TextData
from core.generation.run_tokenizer import RunTokenizer
from core.interop.run_weights import check_average
from core.model.language_model import LanguageModel
from core.recipe.compose import compose_run
from core.recipe.values import show_value
from core.run.data import text_data
from core.run.device import check_device
from core.run.loading import load_weights, run_of
from core.training.early_checks import check_trained
from core.training.resume import newest_checkpoint

ROPE = "model.rope"
"""The section of the recipe that may be another one than in training."""

BATCH_TOKENS = 8192
"""Tokens that are read at once, unless one sequence has more."""


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Args:
        lengths: tokens of a sequence, one measurement each.
        overrides: `model.rope...=VALUE` each: rotary positions that differ from those of the training.
        needles: texts with a needle for each length and depth; 0: none.
        depths: where needles stand, from 0 (the beginning) to 1.
        seed: the seed of the needles.
        device: where the model runs.
        weights: the name of averaged weights; None: those that were trained.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
    """

    lengths: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()
    needles: int = 0
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seed: int = 0
    device: str = "cpu"
    weights: str | None = None
    trust: bool = False


def measure(
    run: Path, options: Options, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measures a run on its held-out documents; mistakes are found before the model is loaded.

    Raises:
        UserError: no run, no held-out documents, a length that the model or the needles do not allow, or another key
            than those of `model.rope`.
        NotFiniteError: a weight or a loss is not finite.
    """
    checkpoint = newest_checkpoint(run)
    folder = run_of(checkpoint)
    if options.weights is not None:
        check_average(checkpoint, options.weights)
    check_trained(folder, "its held-out documents are what is read")
    _check_overrides(options.overrides)
    recipe = compose_run(folder.recipe, options.overrides, trust=options.trust, check_source=True)
    lengths = options.lengths or (recipe.data.sequence_length,)
    words = None
    if options.needles:
        words = _Words.of(RunTokenizer.of(folder))
    _check_lengths(lengths, recipe.model.rope.max_length, words)
    for notice in recipe.notices():
        say(f"note: {notice}")
    check_device(options.device, recipe)
    data = text_data(recipe, plan_of(recipe), folder)
    data.prepare()
    _check_held_out(data, folder.path, max(lengths), with_needles=words is not None)
    recipe.freeze = []
    model = build(recipe)
    load_weights(model, checkpoint, average=options.weights)
    model = model.to(options.device).eval()
    found = []
    for length in lengths:
        loader = data.held_out_sequences(length, max(1, BATCH_TOKENS // length))
        read = _micro_batches(loader, options.device, mask=recipe.data.mask_documents)
        losses = _losses(loss_by_position(model, read, length), data.validation_bytes)
        if not math.isfinite(losses["loss"]):
            why = f"the loss is {losses['loss']} with sequences of {length} tokens"
            raise NotFiniteError(f"{checkpoint}: {why}")
        scores = _needles(model, words, loader, length, options)
        found.append({"length": length, **losses, "needles": scores})
    return {
        "run": folder.path.resolve().name,
        "checkpoint": checkpoint.name,
        "rope": show_value(recipe.model.rope),
        "trained_length": recipe.data.sequence_length,
        "lengths": found,
    }


@dataclass(frozen=True)
class _Words:
    """The tokens before and after the key of a needle, and the marker before a text."""

    begin: int
    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: RunTokenizer) -> "_Words":
        """Those of a run's tokenizer."""
        encode = tokenizer.tokenizer.encode
        return cls(tokenizer.markers.begin, list(encode(BEFORE)), list(encode(AFTER)))


def _check_overrides(overrides: Sequence[str]) -> None:
    """Raises `UserError` for a key of another section than the rotary positions."""
    for override in overrides:
        key = override.partition("=")[0]
        if key != ROPE and not key.startswith(f"{ROPE}."):
            raise UserError(f"{override}: only keys of {ROPE} can be changed here")


def _check_held_out(data: TextData, folder: Path, longest: int, *, with_needles: bool) -> None:
    """Raises `UserError` if nothing is held out, or less than a needle needs around it."""
    if not data.validation_documents:
        raise UserError(f"{folder}: the run has held out nothing; there is nothing to read")
    if with_needles and data.validation_tokens < longest:
        raise UserError(
            f"--lengths {longest}: must be at most {data.validation_tokens} with --needles, the tokens of the "
            "held-out documents around a needle"
        )


def _check_lengths(lengths: tuple[int, ...], longest: int, words: _Words | None) -> None:
    """Raises `UserError` for a length that the positions or the needles do not allow."""
    smallest = 1 if words is None else -other_tokens(0, words.before, words.after)
    for length in lengths:
        if length > longest:
            raise UserError(
                f"--lengths {length}: must be at most model.rope.max_length = {longest}; "
                "give a longer one with model.rope.max_length=N"
            )
        if length < smallest:
            raise UserError(f"--lengths {length}: must be at least {smallest}")


def _losses(positions: list[PositionLoss], size: int) -> dict[str, Any]:
    """The loss of all tokens and of each range; `size`: the bytes of the text, 0 if it has none."""
    tokens = sum(one.tokens for one in positions)
    nats = math.fsum(one.nats for one in positions)
    ranges = []
    for one in positions:
        if one.tokens:
            ranges.append(
                {"first": one.first, "last": one.last, "tokens": one.tokens, "loss": one.loss}
            )
    return {
        "tokens": tokens,
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "positions": ranges,
    }


def _needles(
    model: LanguageModel,
    words: _Words | None,
    loader: ValidationLoader,
    length: int,
    options: Options,
) -> list[dict[str, Any]]:
    """The scores of the needles at each depth."""
    if words is None:
        return []
    stream = [token for batch in loader for token in batch.tokens_BL[batch.valid_BL].tolist()]
    found = []
    for depth in options.depths:
        drawn = needles(
            stream,
            words.before,
            words.after,
            words.begin,
            length=length,
            depth=depth,
            tries=options.needles,
            seed=options.seed,
        )
        found.append(_score(score_needles(model, drawn, length, depth)))
    return found


def _micro_batches(
    loader: ValidationLoader, device: str, *, mask: bool
) -> Iterator[tuple[SequenceContext, Tensor]]:
    """The held-out documents as micro-batches, with their documents."""
    for index, batch in enumerate(loader):
        documents_BM = batch.documents_BM.to(device)
        context = SequenceContext.of(
            batch.tokens_BL.to(device),
            targets_BL=batch.targets_BL.to(device),
            valid_BL=batch.valid_BL.to(device),
            documents_BM=documents_BM if mask else None,
            first_sequence=index * len(batch.tokens_BL),
        )
        yield context, documents_BM


def _score(score: NeedleScore) -> dict[str, Any]:
    return {
        "depth": score.depth,
        "tries": score.tries,
        "exact": score.exact,
        "control_exact": score.control_exact,
        "log_p": score.nats,
        "gain": score.gain.mean,
        "gain_low": score.gain.low,
        "gain_high": score.gain.high,
    }
