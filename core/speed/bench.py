"""All measurements of one `core.bench`, one row after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.contracts.errors import UserError
from core.speed import peer
from core.speed.decoding_speed import NEW, decoding_row, text_of
from core.speed.shapes import DECODED, QUICK, TRAINED, Shape, comparable
from core.speed.surroundings import surroundings
from core.speed.task import Task
from core.speed.training_speed import train_row

WHAT = ("train", "prefill", "decode")
"""What can be measured."""

SECONDS = {False: 60.0, True: 0.5}
FEWEST = {False: 8, True: 2}
"""The time for the turns of one row and its fewest rounds, in full and with `--quick`."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Args:
        recipe: a recipe file or the name of a shipped one; None: the shapes of `core.speed.shapes`.
        overrides: changes of the recipe.
        what: the kinds of rows.
        device: `cpu`, `cuda`, or None for a GPU if there is one.
        seconds: the time for the turns of one row; None: `SECONDS`.
        quick: a tiny model, few rounds and no compiling, to see that everything runs.
        with_peer: whether transformers takes part.
        compiles: whether variants of the peer that compile are measured.
        profile: a folder for traces of our side; None: no traces.
        trust: whether the recipe may name code of its own.
        rows: sequences that are decoded together, a number for each measurement.
        context: tokens of each prompt; None: 1,000, or as many as the model reads.
        new_tokens: tokens that are written after it.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    what: tuple[str, ...] = WHAT
    device: str | None = None
    seconds: float | None = None
    quick: bool = False
    with_peer: bool = True
    compiles: bool = True
    profile: Path | None = None
    trust: bool = False
    rows: tuple[int, ...] = (1,)
    context: int | None = None
    new_tokens: int = NEW

    def shapes(self, usual: Sequence[Shape]) -> Sequence[Shape]:
        """The models: the recipe's, or the tiny one, or the usual ones."""
        if self.recipe is not None:
            return [Shape(self.recipe, self.recipe, self.overrides)]
        if self.quick:
            return [QUICK]
        return usual


def measured_rows(options: BenchOptions, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields a row for each measurement, with where it was made.

    Args:
        options: what to measure.
        say: called before each measurement with what it is.

    Raises:
        UserError: the recipe, the device or an option is wrong, or transformers is missing.
    """
    device = device_of(options.device)
    if options.profile is not None:
        _make_folder(options.profile)
    version = peer.version() if options.with_peer else None
    tasks = [_task(options, shape, device) for shape in options.shapes(TRAINED)]
    texts = []
    for shape in options.shapes(DECODED):
        task = _task(options, shape, device)
        for rows in options.rows:
            texts.append((task, text_of(task, rows, options.context, options.new_tokens)))
    if "train" in options.what:
        for task in tasks:
            say(f"train: {task.measured.shape.name}")
            yield {**train_row(task), **surroundings(device, version)}
    for what in ("prefill", "decode"):
        if what not in options.what:
            continue
        for task, text in texts:
            say(f"{what}: {task.measured.shape.name}, {text.rows} x ({text.context} + {text.new})")
            row = decoding_row(task, text, prefill=what == "prefill")
            yield {**row, **surroundings(device, version)}


def _make_folder(folder: Path) -> None:
    """Makes the folder for traces.

    Raises:
        UserError: there is something else in its place, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UserError(f"--profile {folder}: cannot be made: {cause.strerror}") from cause


def _task(options: BenchOptions, shape: Shape, device: torch.device) -> Task:
    """One model, with the time and the surroundings of its measurements."""
    return Task(
        comparable(shape, trust=options.trust),
        device,
        options.seconds or SECONDS[options.quick],
        with_peer=options.with_peer,
        trust=options.trust,
        fewest=FEWEST[options.quick],
        compiles=options.compiles and not options.quick,
        profile=options.profile,
    )


def device_of(name: str | None) -> torch.device:
    """The device to measure on.

    Raises:
        UserError: it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device = cuda: torch sees no GPU here")
    return torch.device(name)
