"""All measurements of one `core.bench`, one row after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.contracts.errors import UserError
from core.speed import peer
from core.speed.shapes import QUICK, TRAINED, Shape, comparable
from core.speed.surroundings import surroundings
from core.speed.training_speed import Task, train_row

WHAT = ("train",)
"""What can be measured."""

SECONDS = {False: 60.0, True: 0.5}
"""The time for the turns of one row, in full and with `--quick`."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Args:
        recipe: a recipe file or the name of a shipped one; None: the shapes of `core.speed.shapes`.
        overrides: of the recipe.
        what: the kinds of rows.
        device: `cpu`, `cuda`, or None for a GPU if there is one.
        seconds: the time for the turns of one row; None: `SECONDS`.
        quick: a tiny model and few rounds, to see that everything runs.
        with_peer: whether transformers takes part.
        trust: whether the recipe may name code of its own.
        rows: sequences that are decoded together, a number for each measurement.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    what: tuple[str, ...] = WHAT
    device: str | None = None
    seconds: float | None = None
    quick: bool = False
    with_peer: bool = True
    trust: bool = False
    rows: tuple[int, ...] = (1,)

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
    version = peer.version() if options.with_peer else None
    seconds = options.seconds or SECONDS[options.quick]
    trained = [comparable(shape, trust=options.trust) for shape in options.shapes(TRAINED)]
    if "train" in options.what:
        for measured in trained:
            say(f"train: {measured.shape.name}")
            task = Task(
                measured,
                device,
                seconds,
                with_peer=options.with_peer,
                trust=options.trust,
                fewest=2 if options.quick else 8,
            )
            yield {**train_row(task), **surroundings(device, version)}


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
