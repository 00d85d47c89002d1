"""A trained model with its tokenizer beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.generation.completion import Completions, complete
from core.generation.run_tokenizer import RunTokenizer
from core.model.language_model import LanguageModel
from core.run.loading import load, load_tokenizer, run_of


@dataclass(frozen=True)
class LoadedRun:
    """What a run has learned, ready to be used; `model, tokenizer = loaded.model, loaded.tokenizer`.

    Args:
        model: the trained model in evaluation mode, on the CPU.
        tokenizer: turns text into ids and back; None for a run that was trained on ids without a tokenizer.
    """

    model: LanguageModel
    tokenizer: RunTokenizer | None

    def complete(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any
    ) -> Completions:
        """Continues prompts; the options are those of `core.complete`, such as `tokens` and `temperature`."""
        return complete(self.model, prompts, tokenizer=self.tokenizer, **options)


def load_run(
    run_or_checkpoint: str | Path, *, trust: bool = False, weights: str | None = None
) -> LoadedRun:
    """Loads a trained model and its tokenizer, from a run folder (its newest checkpoint) or one checkpoint.

    Args:
        run_or_checkpoint: the run folder, or the checkpoint.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
        weights: the name of averaged weights, such as "ema"; None: those that were trained.

    Raises:
        UserError: what `load` and `load_tokenizer` raise.
    """
    model = load(run_or_checkpoint, trust=trust, weights=weights)
    tokenizer = None
    if run_of(Path(run_or_checkpoint)).tokenizer.exists():
        tokenizer = load_tokenizer(run_or_checkpoint)
    return LoadedRun(model, tokenizer)
